// Real llama.cpp on the CPU, for llama_cpp.py: `node run.mjs FOLDER`, where FOLDER holds the installed node_modules.
//
// Reads one JSON request from stdin:
//   model       path of a GGUF model
//   loras       [{path, scale}], GGUF adapters; llama.cpp multiplies each one's own alpha / rank by scale
//   prompts     [[token id, …], …]
//   max_tokens  how many tokens to choose greedily after each prompt, end-of-text tokens included like any other
//   top         how many of the most likely tokens to report at each place
//   score       whether to report every place of the prompts too
// Writes one JSON answer to stdout, a list with one object for each prompt:
//   tokens      the chosen tokens, max_tokens of them
//   logprobs    for each, the `top` most likely tokens there as [token, natural log of its probability]
//   prompt      with `score`, the same for what follows each token of the prompt; else empty
//   ends        for each chosen token, whether llama.cpp would end the answer at it
// llama.cpp's own messages go to stderr.
import { join, resolve } from "node:path";
import { text } from "node:stream/consumers";
import { pathToFileURL } from "node:url";

const installed = resolve(process.argv[2], "node_modules");
const { getLlama } = await import(pathToFileURL(join(installed, "node-llama-cpp/dist/index.js")));
const request = JSON.parse(await text(process.stdin));

const CHUNK = 16; // prompt tokens at a time: all logits of each are held until the chunk is done
const LOGITS = { generateNext: { token: true, logits: true, options: { temperature: 0 } } };

const llama = await getLlama({
    gpu: false,
    build: "never",
    skipDownload: true,
    maxThreads: 1, // its threads spin while they wait for each other: on a busy machine more of them take many times longer
    logger: (level, message) => process.stderr.write(`${level}: ${message.trimEnd()}\n`),
});

/** The `top` most likely tokens of `logits` (a Map, highest first) with their log-probabilities, in double precision. */
function mostLikely(logits) {
    const values = Float64Array.from(logits.values());
    const normaliser = values[0] + Math.log(values.reduce((sum, logit) => sum + Math.exp(logit - values[0]), 0));
    const tokens = [];
    for (const token of logits.keys()) if (tokens.push(token) >= request.top) break;
    return tokens.map((token, rank) => [token, values[rank] - normaliser]);
}

/** What follows one prompt, a list of tokens. */
async function answer(sequence, prompt) {
    const result = { tokens: [], logprobs: [], prompt: [], ends: [] };
    await sequence.clearHistory();
    let next;
    for (let start = 0; start < prompt.length; start += CHUNK) {
        const wanted = (place) => request.score || place === prompt.length - 1;
        const chunk = prompt.slice(start, start + CHUNK);
        const places = await sequence.controlledEvaluate(
            chunk.map((token, offset) => (wanted(start + offset) ? [token, LOGITS] : token)),
        );
        for (const place of places.filter((place) => place !== undefined)) {
            next = { token: place.next.token, logprobs: mostLikely(place.next.logits) };
            if (request.score) result.prompt.push(next.logprobs);
        }
    }
    while (result.tokens.length < request.max_tokens) {
        result.tokens.push(next.token);
        result.logprobs.push(next.logprobs);
        if (result.tokens.length === request.max_tokens) break;
        const [place] = await sequence.controlledEvaluate([[next.token, LOGITS]]);
        next = { token: place.next.token, logprobs: mostLikely(place.next.logits) };
    }
    result.ends = result.tokens.map((token) => sequence.model.isEogToken(token));
    return result;
}

/** What follows each prompt. */
async function answers() {
    const model = await llama.loadModel({ modelPath: request.model });
    const context = await model.createContext({
        // one more than is used: where the context is full, node-llama-cpp silently forgets the oldest tokens
        contextSize: Math.max(...request.prompts.map((prompt) => prompt.length)) + request.max_tokens + 1,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        failedCreationRemedy: false,
        lora: { adapters: request.loras.map(({ path, scale }) => ({ filePath: path, scale })) },
    });
    const sequence = context.getSequence();
    const all = [];
    for (const prompt of request.prompts) all.push(await answer(sequence, prompt));
    return all;
}

try {
    process.stdout.write(JSON.stringify(await answers()));
} finally {
    await llama.dispose(); // and until then what llama.cpp said of a failure has reached stderr
}
