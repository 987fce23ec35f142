// Which nodes of a program a query finds: each word in a name, target, module or pass; `module:mlp` looks in one column.
import type { Recording, Stage, TextColumn } from "./recording.ts";

const EVERYWHERE: TextColumn[] = ["name", "target", "module", "made_by"];
const COLUMNS: Record<string, TextColumn> = {
  name: "name", target: "target", module: "module", by: "made_by", made_by: "made_by", placement: "placement",
  phase: "phase", layer: "layer", value: "value", source: "source", effect: "effect",
};

export class Search {
  private readonly lower: string[];

  constructor(private readonly recording: Recording) {
    this.lower = recording.data.strings.map((string) => string.toLowerCase());
  }

  /** Positions of the nodes of `stage` that have every word of the query, in execution order. */
  find(stage: Stage, query: string): number[] {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean).map((word) => this.word(word));
    if (!words.length) return [];
    const found: number[] = [];
    stage.order.forEach((record, position) => {
      const has = words.every(({ columns, holds }) =>
        columns.some((column) => holds[this.recording.columns[column][record]!]),
      );
      if (has) found.push(position);
    });
    return found;
  }

  private word(word: string): { columns: TextColumn[]; holds: boolean[] } {
    const [, column, rest] = word.match(/^(\w+):(.+)$/) ?? [];
    const named = column === undefined ? undefined : COLUMNS[column];
    const sought = named ? rest! : word;
    return { columns: named ? [named] : EVERYWHERE, holds: this.lower.map((string) => string.includes(sought)) };
  }
}
