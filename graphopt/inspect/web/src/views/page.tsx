// The frame of the page: title, tabs, search, stages, one view, and the panel of the selected node.
import { useEffect } from "preact/hooks";
import { type Tab, useView, type View } from "../state.ts";
import { Compare } from "./compare.tsx";
import { Diff } from "./diff.tsx";
import { Graph } from "./graph.tsx";
import { Memory } from "./memory.tsx";
import { Schedule } from "./schedule.tsx";
import { SearchBox } from "./search.tsx";
import { Source } from "./source.tsx";
import { Stages } from "./stages.tsx";
import { Summary } from "./summary.tsx";
import { Why } from "./why.tsx";

const VIEWS: Record<Tab, { title: string; view: () => preact.JSX.Element | null }> = {
  graph: { title: "Graph", view: Graph },
  diff: { title: "Diff", view: Diff },
  memory: { title: "Memory", view: Memory },
  schedule: { title: "Schedule", view: Schedule },
  summary: { title: "Summary", view: Summary },
  source: { title: "Source", view: Source },
  compare: { title: "Compare", view: Compare },
};

export function Page() {
  const view = useView();
  const { title, plan } = view.recording.data;
  useEffect(() => {
    const listener = (event: KeyboardEvent) => handleKey(event, view);
    addEventListener("keydown", listener);
    return () => removeEventListener("keydown", listener);
  }, [view]);
  const Current = VIEWS[view.tab.value].view;
  return (
    <>
      <header>
        <h1>{title}</h1>
        <code title="the plan">{plan}</code>
        <nav role="tablist">
          {view.tabs.map((tab, index) => (
            <button key={tab} role="tab" aria-selected={view.tab.value === tab} title={`key ${index + 1}`}
              onClick={() => (view.tab.value = tab)}>{VIEWS[tab].title}</button>
          ))}
        </nav>
        <SearchBox />
      </header>
      {view.onStages && <Stages />}
      <div class="body">
        <main><Current /></main>
        {view.node.value !== null && <Why />}
      </div>
    </>
  );
}

function handleKey(event: KeyboardEvent, view: View): void {
  const typing = event.target instanceof HTMLInputElement;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (typing) (event.target as HTMLInputElement).blur();
    else view.select(null);
  } else if (!typing && event.key === "/") {
    document.querySelector<HTMLInputElement>("#search")?.focus();
    event.preventDefault();
  } else if (!typing && (event.key === "ArrowLeft" || event.key === "ArrowRight") && view.onStages) {
    view.moveStage(event.key === "ArrowLeft" ? -1 : 1);
    event.preventDefault();
  } else if (!typing && /^[1-9]$/.test(event.key)) {
    view.tab.value = view.tabs[Number(event.key) - 1] ?? view.tab.value;
  }
}
