// Bundles src/ into one HTML file, page.html, which has a place for the recording and nothing to load.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const folder = new URL("./", import.meta.url);
process.chdir(folder.pathname);

/** A hash over what the page is built from; tests/inspect/test_page.py computes the same. */
function hashOfSources() {
  const hash = createHash("sha256");
  for (const path of [...listed("src"), "build.mjs", "package-lock.json", "package.json"].sort()) {
    hash.update(`${path}\0`).update(readFileSync(path)).update("\0");
  }
  return hash.digest("hex");
}

function listed(under) {
  return readdirSync(under, { withFileTypes: true }).flatMap((entry) =>
    entry.isDirectory() ? listed(`${under}/${entry.name}`) : [`${under}/${entry.name}`],
  );
}

/** The licenses of the bundled packages, which ask to be kept with the code. */
function licensesOf(inputs) {
  const packages = new Set(inputs.flatMap((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? []));
  return [...packages].sort().map((name) => {
    const [file] = readdirSync(`node_modules/${name}`).filter((entry) => /^licen[cs]e/i.test(entry));
    if (!file) throw new Error(`${name} has no license file`);
    return `${name}\n\n${readFileSync(`node_modules/${name}/${file}`, "utf8").trim()}`;
  }).join("\n\n----\n\n");
}

async function bundle(entry) {
  const result = await build({
    entryPoints: [entry], bundle: true, minify: true, write: false, metafile: true, format: "iife", target: "es2022",
    jsx: "automatic", jsxImportSource: "preact", legalComments: "none",
  });
  return { text: result.outputFiles[0].text.trim(), inputs: Object.keys(result.metafile.inputs) };
}

const script = await bundle("src/main.tsx");
const style = await bundle("src/style.css");
const parts = {
  sources: hashOfSources(), style: style.text, script: script.text, licenses: licensesOf(script.inputs),
};
const page = readFileSync("src/index.html", "utf8").replace(/\{\{(\w+)\}\}/g, (whole, name) => parts[name] ?? whole);
writeFileSync("page.html", page);
console.log(`page.html: ${(page.length / 1024).toFixed(0)} KiB`);
