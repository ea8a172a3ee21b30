// A pretended GPU for CPU builds of torch.
//
// After this library is loaded, torch believes in two CUDA devices. Their memory is the CPU's, and
// an operation on their tensors runs the CPU's kernel on aliases. torch's own machinery for CUDA is
// the real one where it needs no GPU: one autograd thread per device, autocast, generators, guards.
//
// What a GPU refuses is refused: operands on two devices. New memory is NaN until it is written.
//
// Not here: streams, events and graphs (they do nothing), time, memory limits, Triton, cuBLAS. Bytes
// of memory are those of tensors that exist between operations: not the workspace within one.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <random>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr auto CPU = c10::DeviceType::CPU;
constexpr int DEVICES = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device current_device() { return c10::Device(CUDA, current); }

bool on_gpu(const at::Tensor& t) { return t.defined() && t.device().type() == CUDA; }

// Memory: the CPU's, filled with NaN. Each device counts what it holds, and the most that it held.

std::atomic<int64_t> held[DEVICES], highest[DEVICES];

void count_bytes(int d, int64_t bytes) {
  int64_t now = held[d] += bytes, most = highest[d];
  while (now > most && !highest[d].compare_exchange_weak(most, now)) {}
}

constexpr size_t HEADER = 64;  // before the data: how many bytes, and of which device
struct Header {
  int64_t bytes;
  int device;
};

void release(void* data) {
  if (!data) return;
  auto* header = reinterpret_cast<Header*>(static_cast<char*>(data) - HEADER);
  count_bytes(header->device, -header->bytes);
  std::free(header);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, current_device()};
    void* whole = nullptr;
    if (posix_memalign(&whole, 64, HEADER + bytes)) throw std::bad_alloc();
    *static_cast<Header*>(whole) = {(int64_t)bytes, current};
    count_bytes(current, bytes);
    auto* data = static_cast<char*>(whole) + HEADER;
    std::memset(data, 0xFF, bytes);
    return {data, data, &release, current_device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;

// Devices: each thread has a current one. Streams and events exist, and do nothing.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  using Index = c10::DeviceIndex;

  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device d) const override {
    auto old = current_device();
    setDevice(d);
    return old;
  }
  Device getDevice() const override { return current_device(); }
  void setDevice(Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  Index deviceCount() const noexcept override { return DEVICES; }

  Stream stream(Device d) const {
    return Stream(Stream::DEFAULT, Device(CUDA, d.index() < 0 ? current : d.index()));
  }
  Stream getStream(Device d) const override { return stream(d); }
  Stream getDefaultStream(Device d) const override { return stream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(d); }
  Stream getNewStream(Device d, int) const override { return stream(d); }
  Stream exchangeStream(Stream s) const override { return stream(s.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const Index) const override {}
  void record(void** event, const Stream&, const Index, const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

// Random numbers: each device has a stream of its own, which is not the CPU's.

struct Random final : c10::GeneratorImpl {
  at::Generator inner;
  uint64_t given = c10::default_rng_seed_val;

  explicit Random(c10::DeviceIndex index)
      : c10::GeneratorImpl(c10::Device(CUDA, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::make_generator<at::CPUGeneratorImpl>(given ^ 0xCDA)) {}

  c10::GeneratorImpl* impl() const { return inner.unsafeGetGeneratorImpl(); }
  void set_current_seed(uint64_t seed) override {
    given = seed;
    inner.set_current_seed(seed ^ 0xCDA);
  }
  uint64_t current_seed() const override { return given; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return given;
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { impl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return impl()->get_state(); }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Random(device().index());
    copy->given = given;
    copy->impl()->set_state(*get_state());
    return copy;
  }
};

at::Generator& default_generator(c10::DeviceIndex index) {
  static at::Generator all[DEVICES] = {at::make_generator<Random>((c10::DeviceIndex)0),
                                       at::make_generator<Random>((c10::DeviceIndex)1)};
  return all[index < 0 ? current : index];
}

at::Generator& inner_of(const at::Generator& generator) {
  return static_cast<Random*>(generator.unsafeGetGeneratorImpl())->inner;
}

struct Hooks final : at::CUDAHooksInterface {
  using Index = c10::DeviceIndex;
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(Index) const override { return true; }
  const at::Generator& getDefaultGenerator(Index d) const override { return default_generator(d); }
  at::Generator getNewGenerator(Index d) const override {
    return at::make_generator<Random>(d < 0 ? current : d);
  }
  int getNumGPUs() const override { return DEVICES; }
  Index deviceCount() const override { return DEVICES; }
  Index current_device() const override { return current; }
  Index getCurrentDevice() const override { return current; }
  void setCurrentDevice(Index d) const override { current = d; }
  Index exchangeDevice(Index d) const override {
    auto old = current;
    if (d >= 0) current = d;
    return old;
  }
  Index maybeExchangeDevice(Index d) const override { return exchangeDevice(d); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(CPU); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  bool isPinnedPtr(const void*) const override { return false; }
  void deviceSynchronize(Index) const override {}
};

// Operations: the CPU's kernel, on aliases of the tensors.

c10::Storage alias_of(const c10::Storage& storage) {
  c10::DataPtr data(storage.mutable_data(), c10::Device(CPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      c10::GetAllocator(CPU), storage.unsafeGetStorageImpl()->resizable());
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

// A memory of the CPU, given to a GPU without a copy; it lives as long as the GPU's pointer.
c10::DataPtr handed_over(const c10::Storage& storage, c10::Device device) {
  struct Kept {
    c10::Storage storage;
    int64_t bytes;
    int device;
  };
  auto* kept = new Kept{storage, (int64_t)storage.nbytes(), device.index() < 0 ? 0 : device.index()};
  count_bytes(kept->device, kept->bytes);
  auto drop = [](void* given) {
    auto* kept = static_cast<Kept*>(given);
    count_bytes(kept->device, -kept->bytes);
    delete kept;
  };
  return c10::DataPtr(kept->storage.mutable_data(), kept, drop, device);
}

// One operation: the tensors of the GPU that it got, and the aliases that the CPU's kernel sees.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;
  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> storages;  // views of one stay views of one
  c10::Device device = c10::Device(CUDA, -1);

  c10::Storage& alias(const at::Tensor& t) {
    auto* key = t.storage().unsafeGetStorageImpl();
    for (auto& [storage, found] : storages)
      if (storage == key) return found;
    storages.emplace_back(key, alias_of(t.storage()));
    return storages.back().second;
  }

  at::Tensor to_cpu(const at::Tensor& t) {
    if (!on_gpu(t)) return t;
    for (auto& [own, found] : tensors)
      if (own.is_same(t)) return found;
    if (device.index() < 0) device = t.device();
    auto made = tensor_over(alias(t), t, c10::DispatchKey::CPU);
    if (t.unsafeGetTensorImpl()->is_wrapped_number())
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
    if (t.is_neg()) made._set_neg(true);
    if (t.is_conj()) made._set_conj(true);
    tensors.emplace_back(t, made);
    return made;
  }

  at::Tensor to_gpu(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != CPU) return t;
    for (auto& [own, made] : tensors)
      if (made.is_same(t)) return own;
    for (auto& [own, made] : tensors)
      if (made.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(own.storage()), own.key_set(), t.dtype());
        view.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
        return view;
      }
    auto target = device.index() < 0 ? current_device() : device;
    c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                         handed_over(t.storage(), target), &memory, true);
    return tensor_over(storage, t, c10::DispatchKey::CUDA);
  }

  // Gives the GPU's tensors the memory and shape that the kernel may have changed.
  void settle() {
    for (auto& [own, made] : storages)
      if (made.data() != own->data() || made.nbytes() != own->nbytes()) {
        own->set_data_ptr(handed_over(made, own->device()));
        own->set_nbytes(made.nbytes());
      }
    for (auto& [own, made] : tensors)
      if (own.sizes() != made.sizes() || own.strides() != made.strides())
        own.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(),
                                                         made.storage_offset());
  }
};

void check_one_device(const std::string& name, const std::vector<at::Tensor>& tensors) {
  std::optional<c10::Device> first;
  for (auto& t : tensors) {
    if (!t.defined() || (t.device().type() == CPU && t.dim() == 0)) continue;
    TORCH_CHECK(!first || *first == t.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                *first, " and ", t.device(), "! (pretended: ", name, ")");
    first = t.device();
  }
}

using Stack = torch::jit::Stack;

// Reads the operands, and checks that those that meet are on one device. The lists of `_foreach`
// operations meet index by index; indices may be on the CPU.
void check_operands(const c10::FunctionSchema& schema, const Stack& stack, size_t first) {
  const auto& name = schema.operator_name().name;
  const bool by_row = name.rfind("aten::_foreach", 0) == 0;
  const bool by_index = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_unsafe_index", 0) == 0 ||
                        name == "aten::_index_put_impl_";
  std::vector<at::Tensor> all;
  std::vector<std::vector<at::Tensor>> rows;
  for (size_t n = first; n < stack.size(); ++n) {
    const auto& value = stack[n];
    if (value.isTensor()) all.push_back(value.toTensor());
    else if (value.isTensorList()) {
      size_t row = 0;
      for (const at::Tensor& t : value.toTensorList()) {
        if (!by_row) { all.push_back(t); continue; }
        if (rows.size() <= row) rows.emplace_back();
        rows[row++].push_back(t);
      }
    } else if (value.isOptionalTensorList() && !by_index)
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        if (t) all.push_back(*t);
  }
  check_one_device(name, all);
  for (auto& row : rows) check_one_device(name, row);
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size(), first = stack->size() - count;
  check_operands(schema, *stack, first);

  Call call;
  std::optional<c10::Device> asked;
  for (size_t n = first; n < stack->size(); ++n) {
    auto& value = (*stack)[n];
    if (value.isTensor()) value = call.to_cpu(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(call.to_cpu(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<at::Tensor>(call.to_cpu(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == CUDA) {
      asked = value.toDevice();
      value = c10::Device(CPU);
    } else if (value.isGenerator() && value.toGenerator().defined() &&
               value.toGenerator().device().type() == CUDA)
      value = inner_of(value.toGenerator());
  }
  if (call.device.index() < 0)
    call.device = asked && asked->index() >= 0 ? *asked : current_device();
  for (size_t n = 0; n < count; ++n)  // without a generator, the device's own draws
    if (schema.arguments()[n].name() == "generator" && (*stack)[first + n].isNone())
      (*stack)[first + n] = inner_of(default_generator(call.device.index()));
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  call.settle();
  for (size_t n = stack->size() - schema.returns().size(); n < stack->size(); ++n) {
    auto& value = (*stack)[n];
    if (value.isTensor()) value = call.to_gpu(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(call.to_gpu(t));
      value = list;
    }
  }
}

// Operations that the CPU's kernels do not do, or do otherwise than a GPU.

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device> device,
                 std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_same(source) || source.is_meta()) return self;
  Call call;
  auto to = call.to_cpu(self), from = call.to_cpu(source);
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from, non_blocking);
  return self;
}

at::Scalar local_scalar(const at::Tensor& self) {
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(call.to_cpu(self));
}

at::Tensor softmax(const at::Tensor& x, int64_t dim, bool to_float) {
  Call call;
  auto in = call.to_cpu(x);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.to_gpu(at::_softmax(to_float ? in.to(at::kFloat) : in, dim, false));
}

at::Tensor log_softmax(const at::Tensor& x, int64_t dim, bool to_float) {
  Call call;
  auto in = call.to_cpu(x);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.to_gpu(at::_log_softmax(to_float ? in.to(at::kFloat) : in, dim, false));
}

at::Tensor softmax_backward(const at::Tensor& grad, const at::Tensor& out, int64_t dim,
                            at::ScalarType dtype) {
  Call call;
  auto g = call.to_cpu(grad), o = call.to_cpu(out);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.to_gpu(at::_softmax_backward_data(g, o, dim, g.scalar_type()).to(dtype));
}

at::Tensor log_softmax_backward(const at::Tensor& grad, const at::Tensor& out, int64_t dim,
                                at::ScalarType dtype) {
  Call call;
  auto g = call.to_cpu(grad), o = call.to_cpu(out);
  at::AutoDispatchBelowADInplaceOrView below;
  return call.to_gpu(at::_log_softmax_backward_data(g, o, dim, g.scalar_type()).to(dtype));
}

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p,
                                                  std::optional<bool> train) {
  Call call;
  auto in = call.to_cpu(x);
  at::AutoDispatchBelowADInplaceOrView below;
  if (!train.value_or(true) || p == 0)
    return {call.to_gpu(in.clone()), call.to_gpu(at::ones_like(in, at::kBool))};
  auto mask = at::empty_like(in, at::kBool)
                  .bernoulli_(1 - p, inner_of(default_generator(x.device().index())));
  auto kept = p == 1 ? at::zeros_like(in) : in * mask * (1 / (1 - p));
  return {call.to_gpu(kept), call.to_gpu(mask)};
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage storage, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr) impl->set_sizes_contiguous(size);
  else impl->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, c10::Storage storage) {
  int64_t count = storage.nbytes() / self.itemsize();
  return set_storage(self, std::move(storage), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(CUDA, &memory)
}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("native_dropout", &native_dropout);
  m.impl("_softmax", &softmax);
  m.impl("_log_softmax", &log_softmax);
  m.impl("_softmax_backward_data", &softmax_backward);
  m.impl("_log_softmax_backward_data", &log_softmax_backward);
  // Without a kernel of its own, torch would make it of seven others.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("resize_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// What pretended.py calls.
extern "C" {
int pretend_is_known() { return at::detail::getCUDAHooks().hasCUDA(); }

int pretend_exchange_device(int d) {
  int old = current;
  if (d >= 0) current = d;
  return old;
}

int64_t pretend_memory(int d, bool most) { return most ? highest[d] : held[d]; }

void pretend_reset_peak(int d) { highest[d] = held[d].load(); }

void pretend_seed(int d, uint64_t seed) { default_generator(d).set_current_seed(seed); }

// Writes the state of a device's generator to `data`, and returns its size in bytes.
int64_t pretend_get_state(int d, void* data) {
  auto state = default_generator(d).unsafeGetGeneratorImpl()->get_state();
  std::memcpy(data, state->data(), state->numel());
  return state->numel();
}

void pretend_set_state(int d, void* data, int64_t bytes) {
  auto state = at::from_blob(data, {bytes}, at::kByte).clone();
  default_generator(d).unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
}
}
