// Two plans side by side.
import { useView } from "../state.ts";

export function Compare() {
  const { comparison } = useView().recording.data;
  if (!comparison) return null;
  const { left, right, rows, moved } = comparison;
  return (
    <div class="scroll summary">
      <table>
        <thead><tr><th /><th class="number"><code>{left}</code></th><th class="number"><code>{right}</code></th><th class="number">ratio</th></tr></thead>
        <tbody>{rows.map((row, index) => <tr key={index}>{row.map((cell, column) => <td key={column} class={column ? "number" : ""}>{cell}</td>)}</tr>)}</tbody>
      </table>
      <h2>What moved</h2>
      {moved.length === 0 ? <p class="faint">Nothing: both launch the same collectives at the same places.</p> : (
        <table>
          <thead><tr><th>collective</th><th><code>{left}</code></th><th><code>{right}</code></th></tr></thead>
          <tbody>{moved.map((row, index) => <tr key={index}>{row.map((cell, column) => <td key={column}>{cell}</td>)}</tr>)}</tbody>
        </table>
      )}
    </div>
  );
}
