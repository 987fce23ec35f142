import assert from "node:assert/strict";
import { test } from "node:test";
import { boxes } from "../src/model/boxes.ts";
import { align, differences, foldSame, provenance } from "../src/model/diff.ts";
import { bytes, microseconds } from "../src/model/format.ts";
import { history } from "../src/model/history.ts";
import { byOperator, lanes } from "../src/model/lanes.ts";
import { layout, reduced } from "../src/model/layout.ts";
import { definitions, pieces } from "../src/model/python.ts";
import { Search } from "../src/model/search.ts";
import { Timeline } from "../src/model/timeline.ts";
import { chromeTrace } from "../src/model/trace.ts";
import { fold, type Group, hiding, leadingToRepeats, visible } from "../src/model/tree.ts";
import { recording } from "./fixture.ts";

const made = recording();
const names = (records: Iterable<number>) => [...records].map((record) => made.of(record, "name"));

test("a stage is its runs of records, in order", () => {
  assert.deepEqual(names(made.last.order), ["w_shard", "gather", "x", "mm", "relu", "mm_1", "relu_1", "sum", "out"]);
  assert.deepEqual(made.last.readersOf(made.find("gather")), [3, 5]);
});

test("a node is looked for in the stage asked for, then before it, then after it", () => {
  assert.equal(made.stageWith("mm", 1)!.index, 1);
  assert.equal(made.stageWith("w", 2)!.index, 0);
  assert.equal(made.stageWith("gather", 0)!.index, 1);
  assert.equal(made.stageWith("nothing", 0), null);
});

test("alike layers fold into one group, and unfold to each", () => {
  const sections = fold(made, made.last);
  assert.deepEqual(sections.map(({ key, nodes }) => [key, nodes]), [["inputs", 2], ["forward", 6], ["outputs", 1]]);
  const [layers, sum] = sections[1]!.children as [Group, number];
  assert.deepEqual([layers.kind, layers.label, layers.nodes], ["repeat", "model.layers.0 … 1", 5]);
  assert.deepEqual(layers.children.map((child) => (child as Group).label), ["model.layers.0", "model.layers.1"]);
  assert.equal(sum, 7);
});

test("opening what hides a node shows it", () => {
  const sections = fold(made, made.last);
  const keys = hiding(sections, 5);
  const rows = visible(sections, new Set(keys));
  assert.ok(rows.some(({ item }) => item === 5));
  assert.ok(!visible(sections, new Set(keys.slice(0, -1))).some(({ item }) => item === 5));
  assert.deepEqual(leadingToRepeats(sections), ["forward"]);
});

test("groups count what the pass touched", () => {
  const [inputs, forward] = fold(made, made.stage(1));
  assert.deepEqual([inputs!.touched, forward!.touched], [1, 3]);
});

test("sides align at what stayed; what went stands beside what came", () => {
  const pairs = align(made, made.stage(0), made.stage(1));
  assert.deepEqual(pairs.slice(0, 4).map(({ before, after, left, right }) => [before, after, left, right]), [
    [0, 8, "removed", "made"], [1, 1, "same", "same"], [-1, 9, "removed", "made"], [2, 10, "changed", "changed"],
  ]);
  const moved = align(made, made.stage(1), made.stage(2));
  assert.deepEqual(moved.filter(({ left, right }) => left === "moved" || right === "moved").map(({ before, after }) => [before, after]),
    [[-1, 9], [9, -1]]);
});

test("runs without a change fold, all but the lines around", () => {
  const same = { before: 1, after: 1, left: "same", right: "same" } as const;
  const pairs = [...Array(10).fill(same), { ...same, left: "changed", right: "changed" }, ...Array(5).fill(same)];
  const lines = foldSame(pairs, new Set());
  assert.deepEqual(lines.filter((line) => "from" in line), [{ from: 0, to: 7 }, { from: 14, to: 16 }]);
  assert.equal(lines.length, 2 + 3 + 1 + 3);
  assert.equal(foldSame(pairs, new Set([0, 14])).length, 16);
});

test("provenance lists each node once, with its relatives", () => {
  const found = provenance(made, made.stage(1)).map(({ change, record, related }) => [change, made.of(record, "name"), ...related]);
  assert.deepEqual(found, [
    ["made", "w_shard", "w"], ["made", "gather", "w"], ["changed", "mm"], ["changed", "mm_1"], ["removed", "w", "gather"],
  ]);
  assert.deepEqual(differences(made, 2, 10), [{ column: "arguments", before: "x, w", after: "x, gather" }]);
});

test("a history leads from capture over origins to where the node moved", () => {
  const events = history(made, made.last, "gather").map(({ what, stage, record }) => [what, stage, made.of(record, "name")]);
  assert.deepEqual(events, [["captured", 0, "w"], ["made", 1, "gather"], ["moved", 2, "gather"]]);
  const [, removed] = history(made, made.stage(0), "w");
  assert.deepEqual([removed!.what, removed!.stage, removed!.related], ["removed", 1, ["gather"]]);
  assert.deepEqual(history(made, made.last, "mm").map(({ what }) => what), ["captured", "changed"]);
  assert.deepEqual(history(made, made.stage(1), "gather").map(({ what }) => what), ["captured", "made", "moved"]);
});

test("search finds every word, anywhere or in one column", () => {
  const search = new Search(made);
  const found = (query: string) => names(search.find(made.last, query).map((position) => made.last.order[position]!));
  assert.deepEqual(found("layers.0 MM"), ["mm"]);
  assert.deepEqual(found("by:zero"), ["w_shard", "gather"]);
  assert.deepEqual(found("placement:shard"), ["w_shard"]);
  assert.deepEqual(found("name:mm"), ["mm", "mm_1"]);
  assert.deepEqual([found(""), found("nowhere")], [[], []]);
});

test("the timeline keeps peaks", () => {
  const timeline = new Timeline(made.data.memory, made.last.order.length);
  assert.deepEqual([...timeline.total], [8, 24, 24, 24, 24, 24, 8, 8, 8]);
  assert.equal(timeline.highest(0, 9), 1);
  assert.deepEqual(timeline.at(6), [8, 0]);
});

test("lanes find the task at a time, and add up operators", () => {
  const [compute, dp] = lanes(made);
  assert.equal(compute!.at(7)!.name, "mm");
  assert.equal(compute!.at(3), null);
  assert.equal(dp!.at(4.9)!.kind, "all-gather");
  const [first] = byOperator([compute!, dp!], (name) => made.of(made.last.record(made.find(name))!, "target"));
  assert.deepEqual([first!.operator, first!.tasks, first!.total, first!.longest.name], ["aten.mm", 2, 25, "mm_1"]);
});

test("a Chrome trace has a thread a stream and a complete event a task", () => {
  const { traceEvents } = chromeTrace(made) as { traceEvents: { ph: string; name: string; tid?: number; args: { name?: string } }[] };
  const threads = traceEvents.filter(({ name }) => name === "thread_name").map(({ args }) => args.name);
  assert.deepEqual(threads, ["compute", "dp"]);
  assert.deepEqual(traceEvents.filter(({ ph }) => ph === "X").map(({ name }) => name), ["gather", "mm", "relu", "mm_1"]);
});

test("boxes join what is folded, up to a limit", () => {
  const sections = fold(made, made.last).filter(({ key }) => key === "forward");
  const few = boxes(made, made.last, sections, new Set(["forward"]), 10);
  assert.deepEqual(few.boxes.map(({ item }) => typeof item), ["object", "number"]);
  assert.deepEqual(few.edges.map(({ values }) => values), [1]);
  const all = boxes(made, made.last, sections, new Set(hiding(sections, 5)), 3);
  assert.deepEqual([all.boxes.length, all.beyond], [3, 1]);
  const placed = layout(few, () => 100);
  assert.ok(placed.boxes[0]!.y < placed.boxes[1]!.y && placed.frames[0]!.y < placed.boxes[0]!.y);
});

test("edges that a path stands in for are left out", () => {
  const edge = (from: string, to: string) => ({ from, to, values: 1, bytes: 1 });
  const [ab, bc, ac, ca] = [edge("a", "b"), edge("b", "c"), edge("a", "c"), edge("c", "a")];
  assert.deepEqual(reduced([ab, bc, ac]), [ab, bc]);
  assert.deepEqual(reduced([ab, bc, ca]), [ab, bc, ca]);
});

test("Python is cut into pieces that join to the line", () => {
  const line = `    mm_1, x = f(a, "it's", 2.5)  # not 'this'`;
  assert.equal(pieces(line).map((piece) => piece.text).join(""), line);
  assert.deepEqual(pieces("del t_1").map(({ kind, text }) => [kind, text]), [["keyword", "del"], ["plain", " "], ["name", "t_1"]]);
  assert.deepEqual([...definitions([line, "    mm_1 = 2"])], [["mm_1", 0], ["x", 0]]);
});

test("numbers read as people write them", () => {
  assert.deepEqual([0, 1023, 1536, 5 * 2 ** 30].map(bytes), ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]);
  assert.deepEqual([0, 2.5, 1500, 2e6].map(microseconds), ["0", "2.50 µs", "1.50 ms", "2.00 s"]);
});
