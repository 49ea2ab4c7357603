// The server as openai-node meets it: both clients, uploads as a stream (chunked) and as a buffer.
import assert from "node:assert/strict";
import fs from "node:fs";
import { test } from "node:test";
import OpenAI, { AzureOpenAI, toFile } from "openai";

const { SERVER, SPEECH } = process.env;
const english = `${SPEECH}/en/quick_brown_fox.wav`;
const japanese = `${SPEECH}/ja/konnichiwa_sekai.wav`;
const options = { apiKey: "key", maxRetries: 0 };
const azure = (more) => new AzureOpenAI({ endpoint: SERVER, apiVersion: "2024-10-21", ...options, ...more });
const clients = {
  AzureOpenAI: azure,
  "AzureOpenAI with a deployment": (more) => azure({ deployment: "whisper", ...more }),
  "OpenAI at /v1": (more) => new OpenAI({ baseURL: `${SERVER}/v1`, ...options, ...more }),
  "OpenAI at /openai/v1": (more) => new OpenAI({ baseURL: `${SERVER}/openai/v1/`, ...options, ...more }),
};

function heard(text) {
  const words = text.toLowerCase().replace(/[^a-z ]/g, "").trim().split(/ +/);
  const said = "the quick brown fox jumps over the lazy dog".split(" ");
  assert.ok(said.filter((word) => words.includes(word)).length >= 8 && words.length <= 10, text);
}

async function fails(promise, kind, expected) {
  const error = await promise.then(
    () => assert.fail("it was accepted"),
    (error) => error,
  );
  assert.ok(error instanceof kind, String(error));
  for (const [key, value] of Object.entries(expected)) assert.equal(error[key], value, `${key} of ${error}`);
  return error;
}

for (const [name, make] of Object.entries(clients)) {
  const isAzure = name.startsWith("Azure");
  const client = make();
  const transcribe = (more, on = client) =>
    on.audio.transcriptions.create({ file: fs.createReadStream(english), model: "whisper", ...more });

  test(`${name}: json, from a stream and from a buffer`, async () => {
    for (const file of [fs.createReadStream(english), await toFile(fs.readFileSync(english), "音声.wav")]) {
      const answer = await transcribe({ file });
      heard(answer.text);
      assert.deepEqual(Object.keys(answer), isAzure ? ["text"] : ["text", "usage"]);
      if (!isAzure) assert.deepEqual(answer.usage, { type: "duration", seconds: 3 });
    }
  });

  test(`${name}: the file after the fields`, async () => {
    const fields = { model: "whisper", language: "en", temperature: 0, response_format: "json" };
    heard((await client.audio.transcriptions.create({ ...fields, file: fs.createReadStream(english) })).text);
  });

  test(`${name}: text, srt, vtt`, async () => {
    const [text, srt, vtt] = [
      await transcribe({ response_format: "text" }),
      await transcribe({ response_format: "srt" }),
      await transcribe({ response_format: "vtt" }),
    ];
    heard(text);
    assert.ok(text.endsWith("\n"));
    assert.match(srt, /^1\n00:00:00,\d{3} --> 00:00:0\d,\d{3}\n.+\n\n/);
    assert.ok(srt.endsWith("\n\n\n"));
    heard(srt.split("\n")[2]);
    assert.match(vtt, /^WEBVTT\n\n00:00:00\.\d{3} --> 00:00:0\d\.\d{3}\n.+\n\n/);
    heard(vtt.split("\n")[3]);
  });

  test(`${name}: verbose_json with words`, async () => {
    const both = { response_format: "verbose_json", timestamp_granularities: ["word", "segment"] };
    const answer = await transcribe(both);
    const keys = ["task", "language", "duration", "text", "segments", "words"];
    assert.deepEqual(Object.keys(answer), isAzure ? keys : [...keys, "usage"]);
    assert.equal(answer.language, "english");
    heard(answer.words.map((one) => one.word).join(" "));
    const times = answer.words.flatMap((one) => [one.start, one.end]);
    assert.deepEqual(times, times.toSorted((a, b) => a - b));
    assert.ok(times[0] >= 0 && times.at(-1) <= answer.duration && answer.duration < 3);
    const alone = await transcribe({ ...both, timestamp_granularities: ["word"] });
    assert.ok(alone.words.length && alone.segments === undefined);
  });

  test(`${name}: translation`, async () => {
    const file = () => fs.createReadStream(japanese);
    const answer = await client.audio.translations.create({ file: file(), model: "whisper" });
    assert.match(answer.text, /hello/i);
    assert.deepEqual(Object.keys(answer), ["text"]);
    const verbose = { file: file(), model: "whisper", response_format: "verbose_json" };
    const { task, language } = await client.audio.translations.create(verbose);
    assert.deepEqual([task, language], ["translate", "english"]);
  });

  test(`${name}: events`, async () => {
    const events = [];
    for await (const event of await transcribe({ stream: true })) events.push(event);
    const done = events.pop();
    assert.equal(done.type, "transcript.text.done");
    heard(done.text);
    assert.ok(events.length && events.every((one) => one.type === "transcript.text.delta"));
    assert.equal(events.map((one) => one.delta).join(""), done.text);
  });

  test(`${name}: the raw answer and its headers`, async () => {
    const { data, response, request_id } = await transcribe().withResponse();
    heard(data.text);
    assert.equal(response.status, 200);
    assert.ok(request_id && request_id === response.headers.get("x-request-id"));
    assert.match(response.headers.get("apim-request-id"), /^[0-9a-f-]{36}$/);
  });

  test(`${name}: models`, async () => {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.deepEqual(ids, ["whisper"]);
    const gone = { status: 404, code: "model_not_found", param: "model" };
    await fails(client.models.retrieve("nope"), OpenAI.NotFoundError, gone);
  });

  test(`${name}: errors`, async () => {
    const bad = { status: 400, code: "invalid_language_format", param: "language", type: "invalid_request_error" };
    const error = await fails(transcribe({ language: "klingon" }), OpenAI.BadRequestError, bad);
    assert.ok(error.requestID && error.message.includes("klingon"));
    await fails(transcribe({ temperature: 2 }), OpenAI.BadRequestError, { param: "temperature" });
    const noise = await toFile(Buffer.from("this is no sound"), "a.wav");
    await fails(transcribe({ file: noise }), OpenAI.BadRequestError, { param: null });
    await fails(transcribe({ file: noise, stream: true }), OpenAI.BadRequestError, { param: null });
    const large = await toFile(Buffer.alloc(2_000_000), "a.wav");
    await fails(transcribe({ file: large }), OpenAI.APIError, { status: 413, type: "server_error" });
    const wrongKey = { status: 401, code: isAzure ? "401" : "invalid_api_key" };
    await fails(transcribe({}, make({ apiKey: "wrong" })), OpenAI.AuthenticationError, wrongKey);
    const unknown = isAzure ? [{}, azure({ deployment: "nope" })] : [{ model: "nope" }];
    await fails(transcribe(...unknown), OpenAI.NotFoundError, { status: 404, code: "DeploymentNotFound" });
  });
}
