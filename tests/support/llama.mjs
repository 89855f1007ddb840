// Continue prompts greedily by llama.cpp: node llama.mjs FOLDER MODEL.gguf COUNT PROMPTS
// FOLDER holds node_modules, PROMPTS is a JSON list; prints a JSON list of {prompt, ids, text}.
const [folder, modelPath, count, prompts] = process.argv.slice(2);
const {getLlama} = await import(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 64, threads: 1, // more would only spin
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", // by default float16
});
const sequence = context.getSequence();
const found = [];
for (const text of JSON.parse(prompts)) {
    const prompt = model.tokenize(text), ids = [];
    await sequence.clearHistory();
    for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (ids.push(id) === Number(count)) break;
    }
    found.push({prompt, ids, text: model.detokenize(ids)});
}
console.log(JSON.stringify(found));
process.exit(0);
