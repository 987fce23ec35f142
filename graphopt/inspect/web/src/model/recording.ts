// The recording of one compilation, as graphopt/inspect/recording.py writes it. A text is an index into `strings`.

export type Text = number; // -1 is none
export type RecordNumber = number; // one state of one node; a node that a pass leaves alone keeps its record

export interface Columns {
  name: Text[];
  kind: Text[];
  target: Text[];
  arguments: Text[];
  inputs: Text[][];
  value: Text[];
  bytes: number[];
  placement: Text[];
  phase: Text[];
  module: Text[];
  source: Text[];
  layer: Text[];
  effect: Text[];
  made_by: Text[];
  origin: Text[];
}

export type TextColumn = Exclude<keyof Columns, "inputs" | "bytes">;

export interface StageData {
  name: string;
  text: string;
  level: string;
  changed: boolean;
  seconds: number;
  statistics: Record<string, number | string>;
  order: [RecordNumber, number][];
  made: [RecordNumber, Text[]][];
  changed_nodes: [RecordNumber, RecordNumber][];
  removed: [RecordNumber, Text[]][];
  moved: Text[];
}

export interface MemoryData {
  categories: string[];
  changes: Record<string, [number, number][]>;
  peak_position: number;
  peak_bytes: number;
  at_peak: [Text, string, number, number, number][];
}

export interface ScheduleData {
  hardware: string;
  streams: string[];
  tasks: [Text, number, number, number][];
  total_us: number;
  exposed_us: number;
  ranks: string;
}

export interface Verdict {
  passes: { name: string; tier: string; worst: number | null; bound: number; role: string }[]; // worst: null if infinite
  guilty: string | null;
  node: string | null;
}

export interface RecordingData {
  title: string;
  start: string; // the address to open at, such as "memory" or "why=mm_3"
  plan: string;
  pipeline: string;
  world: number;
  mesh: Record<string, number>;
  versions: Record<string, string>;
  compile_seconds: number;
  notes: string[];
  strings: string[];
  records: Columns;
  stages: StageData[];
  repeats: Text[][];
  why: Record<string, Text[]>;
  memory: MemoryData;
  schedule: ScheduleData;
  communication: {
    collectives: { collective: string; axis: string; calls: number; bytes: number }[];
    total_bytes: number;
  };
  memory_table: { by_category: Record<string, number>; peak_bytes: number; peak_node: string; elsewhere?: Record<string, number> };
  source: string;
  comparison: null | { left: string; right: string; rows: string[][]; moved: string[][] };
  verdict?: Verdict; // of running the program beside the model
}

/** The program at one point of the pipeline: records in execution order, and how they differ from the stage before. */
export class Stage {
  readonly order: Int32Array;
  readonly made: ReadonlyMap<RecordNumber, Text[]>;
  readonly changed: ReadonlyMap<RecordNumber, RecordNumber>; // after -> before
  readonly removed: ReadonlyMap<RecordNumber, Text[]>;
  readonly moved: ReadonlySet<Text>;
  private readonly positions = new Map<Text, number>();
  private readonly predecessors = new Map<RecordNumber, RecordNumber>();
  private readonly successors = new Map<RecordNumber, RecordNumber>();
  private readers?: Map<Text, number[]>;

  constructor(readonly data: StageData, readonly index: number, private readonly columns: Columns, previous: Stage | null) {
    this.order = Int32Array.from(data.order.flatMap(([first, count]) => Array.from({ length: count }, (_, i) => first + i)));
    this.order.forEach((record, position) => this.positions.set(columns.name[record]!, position));
    this.made = new Map(data.made);
    this.changed = new Map(data.changed_nodes.map(([before, after]) => [after, before]));
    this.removed = new Map(data.removed);
    this.moved = new Set(data.moved);
    if (previous) this.follow(previous);
  }

  /** Where the node of that name stands, or undefined if the program has none. */
  position(name: Text): number | undefined {
    return this.positions.get(name);
  }

  record(name: Text): RecordNumber | undefined {
    const position = this.positions.get(name);
    return position === undefined ? undefined : this.order[position];
  }

  /** The same node in the stage before; undefined for one that was made. */
  before(record: RecordNumber): RecordNumber | undefined {
    return this.predecessors.get(record);
  }

  /** What a record of the stage before became; undefined for one that was removed. */
  after(record: RecordNumber): RecordNumber | undefined {
    return this.successors.get(record);
  }

  /** Positions of the nodes that read the node of that name. */
  readersOf(name: Text): number[] {
    this.readers ??= this.collectReaders();
    return this.readers.get(name) ?? [];
  }

  /** What the pass did to a record of this stage; the capture, which made all of them, did nothing to tell. */
  touch(record: RecordNumber): Touch | null {
    if (this.index === 0) return null;
    if (this.made.has(record)) return "made";
    if (this.changed.has(record)) return "changed";
    return this.moved.has(this.columns.name[record]!) ? "moved" : null;
  }

  /** A name may pass to another node: what was made or removed is not the node that has its name on the other side. */
  private follow(previous: Stage): void {
    for (const record of this.order) {
      if (this.made.has(record)) continue;
      const before = this.changed.get(record) ?? previous.record(this.columns.name[record]!);
      if (before === undefined || this.removed.has(before)) continue;
      this.predecessors.set(record, before);
      this.successors.set(before, record);
    }
  }

  private collectReaders(): Map<Text, number[]> {
    const readers = new Map<Text, number[]>();
    this.order.forEach((record, position) => {
      for (const name of new Set(this.columns.inputs[record])) {
        const known = readers.get(name);
        if (known) known.push(position);
        else readers.set(name, [position]);
      }
    });
    return readers;
  }
}

export type Touch = "made" | "changed" | "moved";

/** The recording with what is looked up in it; stages are unpacked when first asked for. */
export class Recording {
  readonly columns: Columns;
  private readonly stages: (Stage | undefined)[];
  private texts?: Map<string, Text>;

  constructor(readonly data: RecordingData) {
    this.columns = data.records;
    this.stages = data.stages.map(() => undefined);
  }

  get stageCount(): number {
    return this.stages.length;
  }

  get last(): Stage {
    return this.stage(this.stageCount - 1);
  }

  stage(index: number): Stage {
    const known = this.stages[index];
    if (known) return known;
    const previous = index > 0 ? this.stage(index - 1) : null;
    return (this.stages[index] = new Stage(this.data.stages[index]!, index, this.columns, previous));
  }

  /** The string of an index; empty for none. */
  text(index: Text): string {
    return index < 0 ? "" : this.data.strings[index]!;
  }

  of(record: RecordNumber, column: TextColumn): string {
    return this.text(this.columns[column][record]!);
  }

  /** What an input or output stands for, as its target says it: "shard model.norm.weight" of "input (shard …)". */
  role(record: RecordNumber): string {
    return this.of(record, "target").match(/^(?:in|out)put \((.*)\)$/)?.[1] ?? this.of(record, "target");
  }

  /** The index of a string, or -1 if the recording does not have it. */
  find(text: string): Text {
    this.texts ??= new Map(this.data.strings.map((string, index) => [string, index]));
    return this.texts.get(text) ?? -1;
  }

  /** The stage nearest to `near` that has a node of that name: it, then earlier ones, then later ones. */
  stageWith(name: string, near: number): Stage | null {
    const text = this.find(name);
    if (text < 0) return null;
    const indices = [...Array(this.stageCount).keys()];
    const nearest = [...indices.slice(0, near + 1).reverse(), ...indices.slice(near + 1)];
    const found = nearest.find((index) => this.stage(index).position(text) !== undefined);
    return found === undefined ? null : this.stage(found);
  }
}

/** The recording that the page carries: JSON, compressed (zlib), in base64. */
export async function read(base64: string): Promise<Recording> {
  const characters = atob(base64.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < characters.length; i++) bytes[i] = characters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Recording((await new Response(stream).json()) as RecordingData);
}
