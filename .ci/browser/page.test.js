// The page in a real browser, against the real server with the real model and real speech.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const { CHROMIUM, PICTURES, PYTHON, SPEECH } = process.env;
const FORMATS = ["text", "srt", "vtt", "json", "verbose_json"];
const folder = fs.mkdtempSync(path.join(os.tmpdir(), "whisper-page-"));
const fox = `${SPEECH}/en/quick_brown_fox.wav`;
const several = path.join(folder, "several clips.wav");
const microphone = path.join(folder, "microphone.wav");
const noise = path.join(folder, "noise.wav");
let browser, server, locked;

// -- sound

function samples(file) {
  const wav = fs.readFileSync(file);
  const format = wav.indexOf("fmt ") + 8;
  assert.deepEqual([wav.readUInt16LE(format), wav.readUInt32LE(format + 4)], [3, 16000], "float32 at 16 kHz");
  const data = wav.indexOf("data") + 8;
  return Array.from({ length: Math.floor((wav.length - data) / 4) }, (_, at) => wav.readFloatLE(data + 4 * at));
}

function writeWav(file, sound) {
  const wav = Buffer.alloc(44 + 2 * sound.length);
  wav.write("RIFF", 0), wav.writeUInt32LE(wav.length - 8, 4), wav.write("WAVEfmt ", 8), wav.writeUInt32LE(16, 16);
  wav.writeUInt16LE(1, 20), wav.writeUInt16LE(1, 22), wav.writeUInt32LE(16000, 24), wav.writeUInt32LE(32000, 28);
  wav.writeUInt16LE(2, 32), wav.writeUInt16LE(16, 34), wav.write("data", 36), wav.writeUInt32LE(2 * sound.length, 40);
  sound.forEach((value, at) => wav.writeInt16LE(Math.max(-32768, Math.min(32767, Math.round(value * 32767))), 44 + 2 * at));
  fs.writeFileSync(file, wav);
}

const silence = (seconds) => Array(16000 * seconds).fill(0);
const clips = () => ["quick_brown_fox", "hello_world", "counting"].map((name) => samples(`${SPEECH}/en/${name}.wav`));

function heard(text) {
  const words = text.toLowerCase().replace(/[^a-z ]/g, "").trim().split(/ +/);
  const said = "the quick brown fox jumps over the lazy dog".split(" ");
  assert.ok(said.filter((word) => words.includes(word)).length >= 8, text);
}

// -- servers and pages

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function serve(settings) {
  const environment = Object.entries(process.env).filter(([name]) => !name.startsWith("WHISPER_"));
  const env = { ...Object.fromEntries(environment), WHISPER_MODEL: "base", WHISPER_PORT: "0", ...settings };
  const process_ = spawn(PYTHON, ["../../whisper_server.py"], { env, stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  process_.stderr.on("data", (data) => (log += data));
  while (!/found in|files are in/.test(log)) { // the model's files may still have to come
    assert.equal(process_.exitCode ?? process_.signalCode, null, log);
    await pause(100);
  }
  const port = log.match(/ on http:\/\/[^ ]*:(\d+),/)[1];
  return { at: (host) => `http://${host}:${port}/`, log: () => log, stop: () => process_.kill("SIGKILL") };
}

before(async () => {
  const sound = clips();
  writeWav(several, sound.flatMap((clip) => [...clip, ...silence(1.5)]));
  writeWav(microphone, [...sound[0], ...silence(0.5)]);
  fs.writeFileSync(noise, "this is no sound");
  server = await serve({});
  locked = await serve({ WHISPER_API_KEYS: "opensesame", WHISPER_MAX_UPLOAD_MB: "1" });
  const flags = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
    "disable-sync", "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream",
    `use-file-for-fake-audio-capture=${microphone}`, "host-resolver-rules=MAP 192.168.77.7 127.0.0.1"];
  const args = ["--no-sandbox", ...flags.map((flag) => `--${flag}`)];
  browser = await chromium.launch({ executablePath: CHROMIUM, args, timeout: 120_000 });
}, { timeout: 900_000 });

after(async () => {
  await browser?.close();
  server?.stop();
  locked?.stop();
  fs.rmSync(folder, { recursive: true });
});

// A test on a page of its own. Whatever it does, nothing leaves the origin and the browser has nothing to complain of.
function onPage(name, { url = () => server.at("localhost"), ...options }, body) {
  test(name, { timeout: 300_000 }, async () => {
    const context = await browser.newContext({ locale: "en-US", permissions: ["microphone"], ...options });
    context.setDefaultTimeout(120_000); // the first request loads the model
    const troubles = [];
    context.on("page", (page) => {
      page.on("pageerror", (error) => troubles.push(String(error)));
      page.on("console", (message) => {
        if (!/^Failed to load resource: (the server responded|net::)/.test(message.text())) troubles.push(message.text());
      });
      page.on("request", (request) => {
        if (!request.url().replace(/^blob:/, "").startsWith(url()) && !request.url().startsWith("data:"))
          troubles.push(request.url());
      });
    });
    const page = await context.newPage();
    try {
      await page.goto(url());
      await body(page, context);
      assert.deepEqual(troubles, []);
    } catch (error) {
      const text = await page.innerText("body").catch(() => "");
      error.message += ["", ...troubles, text, server.log().slice(-2000)].join("\n");
      throw error;
    } finally {
      await context.close();
    }
  });
}

async function transcribe(page, file, options = {}) {
  await page.setInputFiles("#file", file);
  if (options.language) await page.selectOption("#language", options.language);
  if (options.task) await page.selectOption("#task", options.task);
  if (options.words) await page.check("#words");
  await page.click("#go");
  await page.waitForSelector("#result:not([hidden]), #error:not([hidden])");
}

// Not by a click, which waits for a button that is seen: the work may have ended meanwhile.
const cancel = (page) => page.evaluate(() => document.getElementById("cancel").click());
const shown = (page, selector) => page.locator(selector).innerText();

async function downloaded(page) {
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
  return { name: download.suggestedFilename(), body: fs.readFileSync(await download.path(), "utf8") };
}

async function served(file, fields) {
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  form.append("file", new File([fs.readFileSync(file)], "a.wav"));
  const route = `${server.at("127.0.0.1")}openai/deployments/whisper-1/audio/transcriptions`;
  return (await fetch(route, { method: "POST", body: form })).text();
}

// -- tests

onPage("a file becomes text", {}, async (page) => {
  assert.ok(await page.isDisabled("#go"));
  await transcribe(page, fox);
  heard(await shown(page, "#segments"));
  assert.match(await shown(page, "#about"), /^English · 0:02$/);
  await page.waitForFunction(() => /^base · CPU int8 · 0 in work$/.test(document.getElementById("server").textContent));
  assert.equal(await shown(page, "#error").catch(() => ""), "");
});

onPage("a file is dropped", { url: () => server.at("127.0.0.1") }, async (page) => {
  const bytes = fs.readFileSync(fox).toString("base64");
  const transfer = await page.evaluateHandle((base64) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], "dropped.wav"));
    return transfer;
  }, bytes);
  await page.dispatchEvent("main", "dragover", { dataTransfer: transfer });
  await page.dispatchEvent("main", "drop", { dataTransfer: transfer });
  assert.match(await shown(page, "#sound"), /^dropped\.wav · 0\.2 MB$/);
  await page.click("#go");
  await page.waitForSelector("#result:not([hidden])");
  heard(await shown(page, "#segments"));
});

onPage("a segment plays its part", {}, async (page) => {
  await transcribe(page, several);
  const { segments } = JSON.parse(await served(several, [["response_format", "verbose_json"]]));
  const rows = page.locator("#segments li");
  assert.ok(segments.length >= 3 && (await rows.count()) === segments.length);
  for (const at of [segments.length - 1, 1]) {
    await page.evaluate((at) => { // keeps what is seen, which may be over before somebody asks
      const player = document.getElementById("player");
      const row = document.querySelectorAll("#segments li")[at];
      const seen = (window.seen = { played: [], marked: false, still: 0, end: null });
      player.playbackRate = 0.5; // so that a busy machine stops it in time, too
      player.ontimeupdate = () => seen.played.push(player.currentTime);
      player.addEventListener("pause", () => (seen.end = player.currentTime), { once: true });
      new MutationObserver(() => (seen.marked ||= row.ariaCurrent === "true")).observe(row, { attributes: true });
      let last = performance.now();
      requestAnimationFrame(function frame(now) { // a page that gets no frames stops the sound that much later
        seen.still = Math.max(seen.still, (now - last) / 1000);
        last = now;
        if (seen.end === null) requestAnimationFrame(frame);
      });
    }, at);
    await rows.nth(at).locator("button").click();
    await page.waitForFunction(() => window.seen.end !== null);
    const { played, marked, still, end } = await page.evaluate(() => window.seen);
    const { start, end: expected } = segments[at];
    assert.ok(marked);
    assert.ok(played.length && Math.min(...played) > start - 0.1, `${played} begins before ${start}`);
    assert.ok(end > start + 0.5 && Math.abs(end - expected) < 0.8 + still / 2, `${end} is not ${expected}`);
  }
  await page.evaluate(() => document.getElementById("player").play()); // from there on it plays freely
  const at = await page.evaluate(() => document.getElementById("player").currentTime);
  await page.waitForFunction((at) => document.getElementById("player").currentTime > at + 0.6, at);
});

onPage("each word has its time", {}, async (page) => {
  await transcribe(page, several, { words: true });
  const fields = [["response_format", "verbose_json"], ["timestamp_granularities[]", "word"]];
  const { words } = JSON.parse(await served(several, fields));
  const seen = await page.locator("ruby").evaluateAll((all) => all.map((one) => [one.firstChild.data, one.dataset.start, one.lastChild.innerText]));
  assert.deepEqual(seen.map(([word, start]) => [word, Number(start)]), words.map(({ word, start }) => [word, start]));
  for (const [, start, label] of seen) assert.ok(Math.abs(Number(label.split(":")[1]) - Number(start)) < 0.011, label);
  await page.locator("ruby").nth(5).click();
  await page.waitForFunction((start) => document.getElementById("player").currentTime >= start, words[5].start);
});

for (const options of [{}, { language: "en", words: true }, { task: "translations" }]) {
  onPage(`downloads and the curl are what the server sends: ${JSON.stringify(options)}`, {}, async (page) => {
    await transcribe(page, several, options);
    for (const format of FORMATS) {
      await page.selectOption("#format", format);
      const { name, body } = await downloaded(page);
      assert.match(name, /^several clips\.(txt|srt|vtt|json|verbose\.json)$/);
      const command = await shown(page, "#curl");
      assert.match(command, new RegExp(`/audio/${options.task ?? "transcriptions"}\\?[^]*response_format=${format}`));
      assert.equal(command.includes("language=en"), options.language === "en");
      const sent = execFileSync("bash", ["-c", command], { cwd: folder, stdio: "pipe", encoding: "utf8" });
      if (options.words && ["srt", "vtt"].includes(format)) continue; // word times make those of segments finer
      assert.equal(body, sent);
      assert.equal(body.includes('"words":'), options.words === true && format === "verbose_json");
    }
  });
}

onPage("times are cut as the server cuts them", {}, async (page) => { // the float32 of 23.64, 47.48; hours beyond 99
  for (const [seconds, expected] of [[23.63999938964844, "00:00:23,639"], [47.47999954223633, "00:00:47,480"],
    [59.9999, "00:00:59,999"], [3599.9990234375, "00:59:59,999"], [360000, "100:00:00,000"]])
    assert.equal(await page.evaluate(`clock(${seconds}, ",")`), expected);
});

onPage("the curl of a file with an odd name", { url: () => locked.at("localhost") }, async (page) => {
  await page.fill("#key", "opensesame");
  const odd = path.join(folder, "it's \"my\" $HOME; `x` \\ 音.wav");
  fs.copyFileSync(fox, odd);
  await transcribe(page, odd);
  await page.evaluate(() => { // it says so for two seconds
    const button = document.getElementById("copy-curl");
    new MutationObserver(() => (window.copied ||= button.textContent === "Copied")).observe(button, { childList: true });
  });
  await page.click("#copy-curl");
  await page.waitForFunction(() => window.copied);
  const command = await shown(page, "#curl");
  assert.ok(!command.includes("opensesame"));
  const env = { ...process.env, WHISPER_API_KEY: "opensesame" };
  heard(execFileSync("bash", ["-c", command], { cwd: folder, stdio: "pipe", encoding: "utf8", env }));
});

onPage("an error is shown in the server's words, and forgotten with the next file", {}, async (page) => {
  await transcribe(page, noise);
  const { error } = JSON.parse(await served(noise, []));
  assert.equal(await shown(page, "#error"), error.message);
  assert.ok(await page.isHidden("#result"));
  await transcribe(page, fox);
  assert.ok(await page.isHidden("#error"));
  heard(await shown(page, "#segments"));
});

onPage("a server that has gone", {}, async (page) => {
  await page.setInputFiles("#file", fox);
  await page.context().setOffline(true);
  await page.waitForFunction(() => fetch("health").then(() => false, () => true));
  await page.click("#go");
  await page.waitForSelector("#error:not([hidden])");
  assert.equal(await shown(page, "#error"), "The server does not answer.");
});

onPage("the key is asked for, and kept for the tab alone", { url: () => locked.at("localhost") }, async (page, context) => {
  await page.waitForFunction(() => document.activeElement.id === "key");
  assert.equal(await shown(page, "#error"), "This server asks for a key.");
  await page.setInputFiles("#file", fox);
  await page.fill("#key", "wrong");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#error:not([hidden])");
  assert.match(await shown(page, "#error"), /invalid subscription key/);
  assert.ok(await page.isEnabled("#go"));
  await page.fill("#key", "opensesame");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#result:not([hidden])");
  heard(await shown(page, "#segments"));
  await page.reload();
  await transcribe(page, fox);
  heard(await shown(page, "#segments"));
  assert.deepEqual([await page.evaluate(() => localStorage.length), await context.cookies()], [0, []]);
  const other = await context.newPage();
  await other.goto(locked.at("localhost"));
  await other.waitForSelector("#key");
  const large = path.join(folder, "large.wav");
  fs.writeFileSync(large, Buffer.alloc(3_000_000));
  await transcribe(page, large);
  assert.match(await shown(page, "#error"), /1048576/);
});

onPage("Japanese by the browser's language", { locale: "ja-JP" }, async (page) => {
  const english = /[a-z]{2,}/gi;
  const nameless = ["ba", "bo"]; // Chromium knows no Japanese names of these languages
  const known = [...nameless, "Whisper", "base", "CPU", "int", "SRT", "WebVTT", "JSON", "MB", "wav", "konnichiwa_sekai", "https", "localhost"];
  const words = async () => (await page.innerText("body")).replace(await shown(page, "#curl").catch(() => ""), "").match(english) ?? [];
  assert.equal(await page.getAttribute("html", "lang"), "ja");
  assert.deepEqual((await words()).filter((word) => !known.includes(word)), []);
  assert.deepEqual(await page.locator("#language option").allInnerTexts().then((all) => all.slice(0, 2)), ["自動", "日本語"]);
  await transcribe(page, `${SPEECH}/ja/konnichiwa_sekai.wav`);
  assert.match(await shown(page, "#segments"), /こんにちは/);
  assert.match(await shown(page, "#about"), /^日本語/);
  assert.deepEqual((await words()).filter((word) => !known.join("").includes(word)), []);
});

for (const form of ["NFC", "NFD"]) // macOS takes letters with marks apart
  onPage(`a Japanese file name, ${form}`, { locale: "ja-JP" }, async (page) => {
    const name = "会議 ガーデン プール".normalize(form);
    fs.copyFileSync(`${SPEECH}/ja/konnichiwa_sekai.wav`, path.join(folder, `${name}.wav`));
    await transcribe(page, path.join(folder, `${name}.wav`));
    assert.ok((await page.innerText("body")).includes(`${name}.wav`));
    for (const format of ["srt", "vtt"]) {
      await page.selectOption("#format", format);
      const saved = await downloaded(page);
      assert.equal(saved.name, `${name}.${format}`);
      assert.match(saved.body, /^[^\ufeff]*こんにちは/);
    }
  });

for (const colorScheme of ["light", "dark"]) {
  onPage(`${colorScheme}: every text can be read`, { colorScheme }, async (page) => {
    await transcribe(page, fox, { words: true });
    const [paper, ...pairs] = await page.evaluate(() => {
      const rgb = (color) => color.match(/[\d.]+/g).map(Number);
      const behind = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return rgb(color)[3] === 0 ? behind(element.parentElement) : rgb(color);
      };
      const texts = [...document.querySelectorAll("h1, h2, p, label, button:enabled, select, .button, li p, ruby, rt, pre, span")];
      return [behind(document.body), ...texts.filter((one) => one.checkVisibility() && one.textContent)
        .map((one) => [one.outerHTML.slice(0, 60), rgb(getComputedStyle(one).color), behind(one)])];
    });
    const light = ([r, g, b]) => [r, g, b].map((value) => value / 255)
      .map((value) => (value <= 0.04 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
      .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
    assert.ok(colorScheme === "light" ? light(paper) > 0.8 : light(paper) < 0.1, String(paper));
    assert.ok(pairs.length > 15);
    for (const [what, text, behind] of pairs) {
      const [low, high] = [light(text), light(behind)].sort((a, b) => a - b);
      assert.ok((high + 0.05) / (low + 0.05) >= 4.5, `${what}: ${text} on ${behind}`);
    }
  });
}

for (const width of [320, 400]) {
  onPage(`a phone of ${width} pixels never scrolls sideways`, { viewport: { width, height: 700 }, hasTouch: true }, async (page) => {
    const fits = async () => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
    await fits();
    const long = path.join(folder, "a".repeat(120) + ".wav");
    fs.copyFileSync(several, long);
    await transcribe(page, long, { words: true });
    await fits();
    for (let taps = 1; ; taps++) { // where the finger's lifting comes late it was no tap
      await page.locator("#segments li").nth(1).tap();
      const plays = page.waitForFunction(() => document.getElementById("player").currentTime > 1, null, { timeout: 30_000 });
      if (await plays.catch(() => null)) break;
      assert.ok(taps < 3, "a tap plays nothing");
    }
  });
}

onPage("by keyboard alone", {}, async (page) => {
  const reach = async (id) => {
    for (let presses = 0; presses < 40; presses++) {
      await page.keyboard.press("Tab");
      const [now, outline] = await page.evaluate(() => {
        const one = document.activeElement;
        const styles = [one, one.parentElement].map((element) => getComputedStyle(element).outlineStyle);
        return [one.id || one.parentElement.tagName, styles.some((style) => style !== "none")];
      });
      assert.ok(outline || ["BODY", "HTML", "player"].includes(now), `${now} does not show that it has the focus`);
      if (now === id) return;
    }
    assert.fail(`${id} is not reached`);
  };
  // Asked for before the keys: Chromium is told by another way than keys go, and the answers of reach() come behind it.
  const chooser = page.waitForEvent("filechooser");
  await Promise.all([chooser, reach("file").then(() => page.keyboard.press("Space"))]);
  await (await chooser).setFiles(several);
  await reach("words");
  await page.keyboard.press("Space");
  await reach("go");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#result:not([hidden])");
  assert.ok((await page.locator("ruby").count()) > 5);
  await reach("format");
  await page.keyboard.press("s");
  await reach("save");
  const [download] = await Promise.all([page.waitForEvent("download"), page.keyboard.press("Enter")]);
  assert.match(download.suggestedFilename(), /\.srt$/);
  await reach("LI");
  await reach("LI");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.getElementById("player").currentTime > 1);
});

onPage("what the microphone hears", {}, async (page) => {
  for (let take = 1; ; take++) {
    await page.click("#record");
    await page.waitForFunction(() => /^Stop · 0:(0[89]|[1-5]\d)/.test(document.getElementById("record").textContent));
    await page.click("#record");
    await page.waitForFunction(() => document.getElementById("record").textContent === "Record");
    assert.match(await shown(page, "#sound"), /^recording\.webm/);
    await page.click("#go");
    await page.waitForSelector("#result:not([hidden])");
    try {
      heard(await shown(page, "#segments"));
      break;
    } catch (error) { // Chromium's made-up microphone loses sound on a busy machine
      if (take === 3) throw error;
    }
  }
  await page.locator("#segments li button").first().click();
  await page.waitForFunction(() => document.getElementById("player").currentTime > 0.3);
});

onPage("plain http from another machine: no recording, and why; all else works", { url: () => server.at("192.168.77.7") }, async (page) => {
  assert.ok(await page.isDisabled("#record"));
  assert.match(await shown(page, "#drop"), /Recording needs https:\/\/ or localhost/);
  await transcribe(page, fox);
  heard(await shown(page, "#segments"));
  await page.click("#copy");
  await page.evaluate(() => {
    document.body.append(Object.assign(document.createElement("textarea"), { id: "pasted" }));
  });
  await page.focus("#pasted");
  await page.keyboard.press("Control+V");
  await page.waitForFunction(() => document.getElementById("pasted").value);
  heard(await page.inputValue("#pasted"));
});

onPage("an upload shows how far it is, and can be stopped", {}, async (page, context) => {
  const network = await context.newCDPSession(page);
  const slow = { offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: 20_000 };
  await network.send("Network.emulateNetworkConditions", slow);
  await page.setInputFiles("#file", several);
  await page.click("#go");
  await page.waitForFunction(() => /^Sending · [1-9]\d? %$/.test(document.getElementById("far").textContent));
  assert.ok(await page.evaluate(() => document.getElementById("bar").value > 0));
  await cancel(page);
  await page.waitForSelector("#working", { state: "hidden" });
  assert.ok((await page.isHidden("#error")) && (await page.isHidden("#result")) && (await page.isEnabled("#go")));
});

onPage("a transcription shows how far it is", {}, async (page) => {
  let id, asked = 0;
  page.on("request", (request) => (id = request.headers()["x-ms-client-request-id"] ?? id));
  let release;
  const seen = new Promise((resolve) => (release = resolve));
  await page.route("**/transcriptions*", async (route) => { // it lasts until the page has shown how far it is
    await seen;
    await route.continue();
  });
  await page.route("**/health", async (route) => { // a file long enough to see would take too long
    const answer = await (await route.fetch()).json();
    asked += id ? 1 : 0;
    const other = { id: "another", model: "base", seconds_done: 1, seconds_known: 10, percent: 10, speed: 1 };
    answer.work = [other, { ...other, id, percent: asked > 1 ? 42 : null, speed: asked > 1 ? 12.34 : 0 }];
    await route.fulfill({ json: answer });
  });
  await page.setInputFiles("#file", fox);
  await page.click("#go");
  await page.waitForFunction(() => document.getElementById("far").textContent === "Transcribing · 42 % · 12.3×");
  release();
  await page.waitForSelector("#result:not([hidden])");
  heard(await shown(page, "#segments"));
  await page.unrouteAll({ behavior: "wait" }); // a look at /health may be under way
});

onPage("the server's own word of a long file is shown", {}, async (page) => {
  const long = path.join(folder, "long.wav");
  const sound = clips().flatMap((clip) => [...clip, ...silence(1)]);
  writeWav(long, Array(60).fill(sound).flat()); // ten minutes
  await page.setInputFiles("#file", long);
  await page.click("#go");
  await page.waitForFunction(() => /^Transcribing · [1-9]\d? % · [\d.]+×$/.test(document.getElementById("far").textContent));
  await cancel(page);
});

onPage("the server is left alone while nobody looks", {}, async (page) => {
  let looks = 0;
  const open = new Set();
  page.on("request", (request) => request.url().endsWith("/health") && open.add(request) && looks++);
  for (const end of ["requestfinished", "requestfailed"]) page.on(end, (request) => open.delete(request));
  await page.clock.install();
  await page.reload();
  const pass = async (seconds) => {
    for (let passed = 0; passed < seconds; passed += 5) {
      await page.clock.runFor(5000);
      do await pause(100); while (open.size); // the next look is arranged when the answer has come
    }
  };
  const turn = (hidden) => page.evaluate((hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  }, hidden);
  await pass(60);
  assert.ok(looks >= 6 && looks <= 40, String(looks)); // 12, and those of the time that passes meanwhile
  await turn(true);
  await pass(10);
  const before = looks;
  await pass(60);
  assert.equal(looks, before);
  await turn(false);
  await pass(30);
  assert.ok(looks > before);
});

for (const [name, colorScheme, locale, sounds] of [
  ["page", "light", "en-US", ["en/quick_brown_fox", "en/hello_world"]],
  ["page-ja-dark", "dark", "ja-JP", ["ja/konnichiwa_sekai", "ja/kazoeru"]],
].filter(() => PICTURES)) {
  onPage(`picture ${name}`, { colorScheme, locale, viewport: { width: 860, height: 600 } }, async (page) => {
    const talk = path.join(folder, "talk.wav");
    writeWav(talk, sounds.flatMap((sound) => [...samples(`${SPEECH}/${sound}.wav`), ...silence(1.5)]));
    await transcribe(page, talk);
    await page.waitForFunction(() => document.getElementById("server").textContent.includes("CPU"));
    await page.screenshot({ path: path.join(PICTURES, `${name}.png`), fullPage: true });
  });
}
