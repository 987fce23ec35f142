// Bytes alive after each node, by category.
import type { MemoryData } from "./recording.ts";

export class Timeline {
  readonly total: Float64Array;
  private readonly bytes: Float64Array[]; // of each category

  constructor(readonly data: MemoryData, readonly length: number) {
    this.bytes = data.categories.map((category) => steps(data.changes[category] ?? [], length));
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
