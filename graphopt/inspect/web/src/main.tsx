import { render } from "preact";
import { read } from "./model/recording.ts";
import { View, ViewProvider } from "./state.ts";
import { Page } from "./views/page.tsx";

async function start(): Promise<void> {
  const place = document.getElementById("page")!;
  try {
    const view = new View(await read(document.getElementById("recording")!.textContent));
    document.title = `${view.recording.data.title} · ${view.recording.data.plan}`;
    place.replaceChildren();
    render(<ViewProvider value={view}><Page /></ViewProvider>, place);
  } catch (error) {
    place.textContent = `This page's recording cannot be shown: ${error}`;
    throw error;
  }
}

addEventListener("DOMContentLoaded", start);
