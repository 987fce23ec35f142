// Bytes alive after each node, by category.
import type { MemoryData } from "./recording.ts";

/** From what stays throughout, at the foot of the stack, to what comes and goes; others are drawn on top. */
const STACK = ["parameters", "optimizer", "buffers", "batch", "segments", "communication", "gathered", "host", "gradients", "outputs", "activations", "temporaries"];

export class Timeline {
  readonly categories: string[];
  readonly total: Float64Array;
  private readonly bytes: Float64Array[]; // of each category

  constructor(readonly data: MemoryData, readonly length: number) {
    const rank = (category: string) => STACK.indexOf(category) + 1 || STACK.length + 1;
    this.categories = [...data.categories].sort((a, b) => rank(a) - rank(b));
    this.bytes = this.categories.map((category) => steps(data.changes[category] ?? [], length));
    this.total = new Float64Array(length);
    for (const each of this.bytes) each.forEach((value, position) => (this.total[position]! += value));
  }

  /** Bytes of each category at a position, in the order of the categories. */
  at(position: number): number[] {
    return this.bytes.map((each) => each[position]!);
  }

  /** The position with the most bytes among those from `first` to before `end`, so that no peak is lost in drawing. */
  highest(first: number, end: number): number {
    let best = first;
    for (let position = first + 1; position < end; position++) {
      if (this.total[position]! > this.total[best]!) best = position;
    }
    return best;
  }
}

function steps(changes: [number, number][], length: number): Float64Array {
  const values = new Float64Array(length);
  changes.forEach(([position, value], index) => values.fill(value, position, changes[index + 1]?.[0] ?? length));
  return values;
}
