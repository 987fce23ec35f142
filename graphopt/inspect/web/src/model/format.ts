// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(count: number): string {
  const power = count < 1 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(count) / 10));
  const scaled = count / 1024 ** power;
  return `${power === 0 ? Math.round(scaled) : scaled.toFixed(scaled < 10 ? 2 : 1)} ${UNITS[power]}`;
}

export function microseconds(time: number): string {
  if (time === 0) return "0";
  if (time >= 1e6) return `${(time / 1e6).toFixed(2)} s`;
  if (time >= 1e3) return `${(time / 1e3).toFixed(2)} ms`;
  return `${time.toFixed(time < 10 ? 2 : 1)} µs`;
}

export function count(number: number): string {
  return number.toLocaleString("en-US");
}

/** "1 node", "2 nodes". */
export function plural(number: number, noun: string, many = `${noun}s`): string {
  return `${count(number)} ${number === 1 ? noun : many}`;
}
