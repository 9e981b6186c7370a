// Ask llama.cpp, through node-llama-cpp, about one GGUF: node llama_cpp.mjs JOB.json ANSWERS.json
//
// JOB: package_file, model, context_tokens, threads, texts, stop_ids, prompts, max_tokens, probes.
// ANSWERS: tokenized (ids of each text), stops (whether each id ends an answer), template,
// generated (ids of each greedy answer, the stop token included), probabilities (of every token
// after each probe).
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const {getLlama} = await import(pathToFileURL(job.package_file).href);
const llama = await getLlama({
    gpu: false, build: "never", logLevel: "error", maxThreads: job.threads
});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({contextSize: job.context_tokens});
const sequence = context.getSequence();

const generated = [];
for (const prompt of job.prompts) {
    await sequence.clearHistory();
    const ids = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ids.push(token);
        if (model.isEogToken(token) || ids.length === job.max_tokens)
            break;
    }
    generated.push(ids);
}

const probabilities = [];
for (const probe of job.probes) {
    await sequence.clearHistory();
    const last = [probe.at(-1), {generateNext: {probabilities: true}}];
    const output = await sequence.controlledEvaluate([...probe.slice(0, -1), last]);
    probabilities.push([...output.at(-1).next.probabilities.entries()]);
}

writeFileSync(process.argv[3], JSON.stringify({
    tokenized: job.texts.map((text) => model.tokenize(text, true)),
    stops: job.stop_ids.map((id) => model.isEogToken(id)),
    template: model.fileInfo.metadata.tokenizer.chat_template,
    generated,
    probabilities
}));
process.exit(0);
