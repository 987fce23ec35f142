// The search box: counts matches, lists the first, steps through all.
import { useState } from "preact/hooks";
import { count } from "../model/format.ts";
import { useView } from "../state.ts";

const LISTED = 12;
const HINT = "words in a name, operator, module or pass; or module:mlp, target:mm, by:zero, placement:shard, phase:backward";

export function SearchBox() {
  const view = useView();
  const [focused, setFocused] = useState(false);
  const matches = view.matches.value;
  const place = view.matchIndex();
  const asked = view.query.value.trim() !== "";
  return (
    <div class="search" role="search">
      <input id="search" type="search" placeholder="Search  /" title={HINT} spellcheck={false} autocomplete="off"
        value={view.query.value}
        onInput={(event) => (view.query.value = event.currentTarget.value)}
        onFocus={() => setFocused(true)}
        onBlur={() => setFocused(false)}
        onKeyDown={(event) => {
          if (event.key === "Enter" || event.key === "ArrowDown") view.step(event.shiftKey ? -1 : 1);
          else if (event.key === "ArrowUp") view.step(-1);
          else return;
          event.preventDefault();
        }} />
      <output id="matches">{asked && (place >= 0 ? `${count(place + 1)} of ${count(matches.length)}` : `${count(matches.length)} found`)}</output>
      {focused && asked && <Found />}
    </div>
  );
}

function Found() {
  const view = useView();
  const { recording } = view;
  const matches = view.matches.value;
  const first = Math.max(0, Math.min(view.matchIndex() - 3, matches.length - LISTED));
  if (!matches.length) {
    return <div class="found"><p>No node of this program has all of this. {HINT[0]!.toUpperCase() + HINT.slice(1)}.</p></div>;
  }
  return (
    <div class="found">
      {matches.slice(first, first + LISTED).map((position) => {
        const record = view.shown.order[position]!;
        const name = recording.of(record, "name");
        return (
          <button key={position} class={view.node.value === name ? "selected" : ""}
            onMouseDown={(event) => { event.preventDefault(); view.selectAt(position); }}>
            <span class="mono">{name}</span>
            <span class="mono faint">{recording.of(record, "target")}</span>
            <span class="faint">{recording.of(record, "module")}</span>
          </button>
        );
      })}
      {matches.length > LISTED && <p>Enter and ⇧Enter step through all {count(matches.length)}</p>}
    </div>
  );
}
