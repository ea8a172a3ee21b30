# make demo       set up .venv, then fine-tune a real model and show what it learned
# make test       set up .venv, then lint, types, documentation and tests
# make sentiment  a real classifier: LoRA against the head alone, on movie reviews
# make glue       GLUE's tasks and E2E NLG by one train and one evaluate line each: make glue DATA=folder (over an hour on one core)
# make family     all members on two real models: what each learns and costs (about 50 minutes on two cores)
# make claims     the papers' claims on GLUE and E2E, with power to see a point: make claims DATA=folder, or DATA=hub, which fetches them (many hours on two cores; resumable)
# make interop    all members in PEFT, plain LoRA, merged, llama.cpp: the same model? (about 40 minutes; needs npm)
# make bench      lorakin against PEFT, the frozen base and full fine-tuning: time and memory (over an hour on two cores)
# make gpu        on a machine with a GPU: the tests of tests/gpu, then steps beside PEFT, memory, lorakin train; one table (8 minutes)
# make sweep      LoRA on every architecture that transformers makes from a config: docs/evidence/architectures.md (three minutes)
# make templates  what is learned under every chat template that trl and transformers carry: docs/evidence/templates.md (a minute)
# make ui         lorakin ui in a real browser with the packaged model, axe-core's look at it, and its time to start (fifteen minutes; needs Chromium and npm)
# make soak       stress tests: 200 kills, 10,000 hostile files, 50,000 reads while others write, members × bases × parallelism (about 40 minutes)
# make docs       the documentation as a site for reading offline: site/index.html (strict: a broken link or a missing name fails)
# make lock       write constraints.txt again, from the versions in .venv and the hashes that PyPI lists
# make check      lint and types only
# make clean      remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

# a section of constraints.txt: each file is taken only if it has one of the hashes that stand there (tools/lock.py has the sections)
locked = awk '$$2 == "$(1)" { on = 1 } on; $$2 == "end" { on = 0 }' constraints.txt > $(VENV)/$(1).txt \
	&& $(PIP) --require-hashes --requirement $(VENV)/$(1).txt
OFFLINE := $(if $(filter hub,$(DATA)),,HF_HUB_OFFLINE=1)
NEEDS_CUDA := import sys; from importlib.metadata import requires; \
	sys.exit(not (sys.platform == "linux" and any(line.startswith(("nvidia", "cuda")) for line in requires("torch") or ())))

.PHONY: demo test sentiment glue family claims interop gpu sweep templates bench ui soak check docs lock clean

demo: $(VENV)/.train
	$(BIN)/lorakin demo --out demo

test: check docs $(VENV)/.llama
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.test
	$(BIN)/ruff check src tests examples benchmarks tools
	$(BIN)/ruff format --check src tests examples benchmarks tools
	$(BIN)/mypy

sentiment: $(VENV)/.train
	HF_HUB_OFFLINE=1 $(BIN)/python examples/movie_sentiment.py

glue: $(VENV)/.train
	HF_HUB_OFFLINE=1 $(BIN)/python examples/glue.py --data $(DATA) --out glue

family: $(VENV)/.train
	HF_HUB_OFFLINE=1 $(BIN)/python examples/family.py --out family

claims: $(VENV)/.train
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims run --data $(DATA) --out claims
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims write --data $(DATA) --out claims
	$(OFFLINE) $(BIN)/python -m benchmarks.claims keep --data $(DATA) --out claims
	$(BIN)/python -m benchmarks.claims page

interop: $(VENV)/.test $(VENV)/.llama
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python examples/interop.py --out interop

sweep: $(VENV)/.test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(BIN)/python -m sweep.table

templates: $(VENV)/.test
	HF_HUB_OFFLINE=1 PYTHONPATH=src:tests $(BIN)/python -m training.template_table

ui: $(VENV)/.test $(VENV)/.axe
	mkdir -p soak
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LORAKIN_SOAK=$(CURDIR)/soak $(BIN)/python -m pytest tests/ui
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ui_start

docs: $(VENV)/.docs
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

gpu: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

bench: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks --out bench

soak: $(VENV)/.test
	$(call locked,deepspeed) || echo "DeepSpeed could not be installed (it needs a C++ compiler): its part is skipped"
	rm -rf soak && mkdir soak
	HF_HUB_OFFLINE=1 LORAKIN_SOAK=$(CURDIR)/soak LORAKIN_KILLS=200 LORAKIN_FUZZ=10000 LORAKIN_READS=50000 $(BIN)/python -m pytest \
		tests/storage/test_fuzz.py tests/training/test_fuzz.py tests/training/test_gguf_header.py tests/training/test_model_files.py tests/training/test_kills.py tests/training/test_members.py \
		tests/training/test_processes.py tests/inject/test_quantised.py tests/loop/test_fsdp.py \
		tests/storage/test_readers.py tests/serving/test_output.py tests/serving/test_served.py tests/inject/test_threads.py \
		tests/cli/test_fuzz.py tests/compare/test_fuzz.py tests/training/test_progress.py tests/training/test_schedules.py
	$(BIN)/python tests/soak.py soak

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorakin needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt models.txt
	@echo "installing lorakin and its pinned dependencies into $(VENV) (about a minute)"
	$(call locked,train)
	{ $(call locked,cpu); } 2> /dev/null || { $(call locked,torch); }
	if $(BIN)/python -c '$(NEEDS_CUDA)'; then $(call locked,cuda); fi
	$(PIP) --no-build-isolation --editable .
	$(PIP) --require-hashes --requirement models.txt
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(call locked,test)
	if [ "$$(uname)" = Linux ]; then $(call locked,kernels); fi
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(call locked,docs)
	@touch $@

# llama.cpp, prebuilt, from npm: a peer of the tests, which say so where it is missing
$(VENV)/.llama: tests/peers/llama/package.json tests/peers/llama/package-lock.json | $(VENV)/bin/python
	@mkdir -p $(VENV)/llama && cp tests/peers/llama/package*.json $(VENV)/llama
	@if command -v npm > /dev/null \
		&& npm ci --silent --no-audit --no-fund --ignore-scripts --omit=optional --prefix $(VENV)/llama; \
	then touch $@; else echo "npm is missing or could not install llama.cpp, so the tests that need it are skipped"; fi

# axe-core: what it finds on the page for readers with disabilities is a failure of make ui
$(VENV)/.axe: tests/ui/axe/package.json tests/ui/axe/package-lock.json | $(VENV)/bin/python
	@mkdir -p $(VENV)/axe && cp tests/ui/axe/package*.json $(VENV)/axe
	@npm ci --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/axe && touch $@

lock: $(VENV)/.docs
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) site demo glue family claims interop bench gpu-results soak build dist src/lorakin.egg-info .mypy_cache .pytest_cache .ruff_cache
