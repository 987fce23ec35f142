// A line of Python in pieces to color: enough for what graphopt emits, which has no string over several lines but its first.
export interface Piece {
  kind: "comment" | "string" | "keyword" | "number" | "name" | "plain";
  text: string;
}

const PIECES =
  /(?<comment>#.*)|(?<string>"""[\s\S]*?"""|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?<keyword>\b(?:and|as|class|def|del|elif|else|False|finally|for|from|if|import|in|is|lambda|None|not|or|pass|raise|return|True|try|while|with|yield)\b)|(?<name>[A-Za-z_]\w*)|(?<number>\b\d[\w.]*)/g;

export function pieces(line: string): Piece[] {
  const found: Piece[] = [];
  let at = 0;
  for (const match of line.matchAll(PIECES)) {
    if (match.index > at) found.push({ kind: "plain", text: line.slice(at, match.index) });
    const [kind] = Object.entries(match.groups!).find(([, text]) => text !== undefined)!;
    found.push({ kind: kind as Piece["kind"], text: match[0] });
    at = match.index + match[0].length;
  }
  if (at < line.length) found.push({ kind: "plain", text: line.slice(at) });
  return found;
}

/** For each name that is assigned, the first line that does so. */
export function definitions(lines: string[]): Map<string, number> {
  const found = new Map<string, number>();
  lines.forEach((line, index) => {
    for (const name of line.match(/^\s+([\w, ]+?) = /)?.[1]!.split(", ") ?? []) if (!found.has(name)) found.set(name, index);
  });
  return found;
}
