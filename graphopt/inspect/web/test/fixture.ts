// A recording small enough to reason about: two alike layers, captured, then sharded by a pass that gathers a weight.
import { type Columns, Recording, type RecordingData } from "../src/model/recording.ts";

const strings = [""];
const text = (string: string) => (strings.includes(string) ? strings.indexOf(string) : strings.push(string) - 1);

type Node = { name: string; kind?: string; target: string; inputs?: string[]; module?: string; phase?: string; origin?: string; by?: string };

const NODES: Node[] = [
  { name: "w", kind: "input", target: "input (parameter w)" }, // 0
  { name: "x", kind: "input", target: "input (batch x)" }, // 1
  { name: "mm", target: "aten.mm", inputs: ["x", "w"], module: "model.layers.0.linear" }, // 2
  { name: "relu", target: "aten.relu", inputs: ["mm"], module: "model.layers.0" }, // 3
  { name: "mm_1", target: "aten.mm", inputs: ["relu", "w"], module: "model.layers.1.linear" }, // 4
  { name: "relu_1", target: "aten.relu", inputs: ["mm_1"], module: "model.layers.1" }, // 5
  { name: "sum", target: "aten.sum", inputs: ["relu_1"] }, // 6
  { name: "out", kind: "output", target: "outputs", inputs: ["sum"] }, // 7
  { name: "w_shard", kind: "input", target: "input (shard w)", origin: "w", by: "zero" }, // 8
  { name: "gather", target: "all_gather", inputs: ["w_shard"], module: "model.layers.0.linear", origin: "w", by: "zero" }, // 9
  { name: "mm", target: "aten.mm", inputs: ["x", "gather"], module: "model.layers.0.linear" }, // 10
  { name: "mm_1", target: "aten.mm", inputs: ["relu", "gather"], module: "model.layers.1.linear" }, // 11
];

function columns(): Columns {
  const of = (value: (node: Node) => string) => NODES.map((node) => text(value(node)));
  return {
    name: of((node) => node.name),
    kind: of((node) => node.kind ?? "call"),
    target: of((node) => node.target),
    arguments: of((node) => (node.inputs ?? []).join(", ")),
    inputs: NODES.map((node) => (node.inputs ?? []).map(text)),
    value: of(() => "float32[4]"),
    bytes: NODES.map(() => 16),
    placement: of((node) => (node.name === "w_shard" ? "shard 0 on dp" : "own batch")),
    phase: of((node) => node.phase ?? "forward"),
    module: of((node) => node.module ?? ""),
    source: of(() => "model.py:1"),
    layer: of(() => ""),
    effect: of(() => "pure"),
    made_by: of((node) => node.by ?? "capture"),
    origin: NODES.map((node) => (node.origin ? text(node.origin) : -1)),
  };
}

export function recording(): Recording {
  const records = columns();
  const stage = { seconds: 0, statistics: {}, level: "forward", changed: true };
  const data: RecordingData = {
    title: "Model", start: "", plan: "dp=2,zero=3", pipeline: "zero,schedule", world: 2, mesh: { dp: 2 }, versions: {}, compile_seconds: 0,
    notes: [], strings, records,
    stages: [
      { ...stage, name: "capture", text: "capture", order: [[0, 8]], made: [], changed_nodes: [], removed: [], moved: [] },
      {
        ...stage, name: "zero", text: "zero", order: [[8, 1], [1, 1], [9, 2], [3, 1], [11, 1], [5, 3]],
        made: [[8, [text("w")]], [9, [text("w")]]], changed_nodes: [[2, 10], [4, 11]], removed: [[0, [text("gather")]]], moved: [],
      },
      {
        ...stage, name: "schedule", text: "schedule", order: [[8, 2], [1, 1], [10, 1], [3, 1], [11, 1], [5, 3]],
        made: [], changed_nodes: [], removed: [], moved: [text("gather")],
      },
    ],
    repeats: [[text("model.layers.0"), text("model.layers.1")]],
    why: { [text("gather")]: [text("zero: gathers w for forward alone")] },
    memory: {
      categories: ["parameters", "gathered"], changes: { parameters: [[0, 8]], gathered: [[1, 16], [6, 0]] },
      peak_position: 1, peak_bytes: 24, at_peak: [[text("gather"), "gathered", 16, 1, 5], [text("w_shard"), "parameters", 8, 0, 8]],
    },
    schedule: {
      hardware: "", streams: ["compute", "dp"], total_us: 30, exposed_us: 5, ranks: "",
      tasks: [[text("gather"), 1, 0, 5], [text("mm"), 0, 5, 10], [text("relu"), 0, 15, 0], [text("mm_1"), 0, 15, 15]],
    },
    communication: { collectives: [], total_bytes: 0 },
    memory_table: { by_category: {}, peak_bytes: 24, peak_node: "gather" },
    source: "", comparison: null,
  };
  return new Recording(data);
}
