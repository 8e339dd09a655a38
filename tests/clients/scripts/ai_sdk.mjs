import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.NODE_MODULES}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateObject, generateText, Output, streamObject, streamText, stepCountIs, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");

const baseURL = `${process.argv[2]}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "unused" });
const compatible = createOpenAICompatible({ name: "mesh", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const models = {
  compatible: compatible.chatModel("tiny"),
  chat: openai.chat("tiny"),
  responses: openai.responses("tiny"),
  messages: createAnthropic({ baseURL, apiKey: "unused" })("tiny"),
};
const schema = z.object({ name: z.string(), age: z.number().int() });
const ada = { name: "Ada", age: 36 };
const tools = {
  get_weather: tool({
    description: "The weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};
const forecast = "It is sunny in Paris.";

for (const [name, model] of Object.entries(models)) {
  const asked = { model, maxRetries: 0, prompt: "Who was Ada?" };
  assert.deepEqual((await generateObject({ ...asked, schema })).object, ada, name);
  const object = streamObject({ ...asked, schema });
  for await (const _ of object.partialObjectStream);
  assert.deepEqual(await object.object, ada, name);
  const agent = { model, maxRetries: 0, prompt: "Weather in Paris?", tools, stopWhen: stepCountIs(3) };
  assert.equal((await generateText(agent)).text, forecast, name);
  const text = streamText(agent);
  await text.consumeStream();
  assert.equal(await text.text, forecast, name);
  const both = await generateText({ ...agent, output: Output.object({ schema }) });
  assert.deepEqual(both.output, ada, name);
  assert.equal(both.steps.length, 2, name);
  const { toolCalls } = await generateText({ ...agent, toolChoice: "required", stopWhen: stepCountIs(1) });
  assert.deepEqual(toolCalls[0].input, { city: "Paris" }, name);
}
