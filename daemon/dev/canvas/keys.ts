/** The keys of the canvas: add, refine, connect, open, select with others, delete, deselect. */
import { useEffect } from "react";
import type { ImageFlowNode } from "./ImageNode";

interface Commands {
  add: () => void;
  refine: (id: string) => void;
  /** Begins an edge at a node. */
  connect: (id: string) => void;
  /** Ends the edge that was begun at a node; returns false where none was. */
  connectTo: (id: string) => boolean;
  open: (id: string) => void;
  generate: (nodes: readonly ImageFlowNode[]) => void;
  remove: (nodes: readonly ImageFlowNode[]) => void;
  toggle: (id: string) => void;
  deselect: () => void;
}

/** `isOpen`: whether the canvas itself is what keys are meant for, and may be changed. */
export function useKeys(nodes: readonly ImageFlowNode[], isOpen: boolean, commands: Commands): void {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (!isOpen || target.closest("input, textarea, select, dialog, [popover]")) return;
      const focusedId = target.matches(".react-flow__node") ? target.dataset["id"] : undefined;
      const focused = nodes.find(node => node.id === focusedId);
      const selected = nodes.filter(node => node.selected);
      // What is focused is meant, unless it is one of several that are selected.
      const meant = selected.length > 1 && (!focused || focused.selected) ? selected : focused ? [focused] : selected;
      const [one] = meant.length === 1 ? meant : [];
      const isPlain = !event.ctrlKey && !event.metaKey && !event.altKey && !event.shiftKey;
      const key = event.key.toLowerCase();
      const take = (run: () => void) => {
        event.preventDefault();
        event.stopPropagation(); // React Flow would select, or deselect, too
        run();
      };
      if (key === "n" && isPlain) take(commands.add);
      else if (key === "r" && isPlain && one) take(() => commands.refine(one.id));
      else if (key === "c" && isPlain && one) take(() => commands.connect(one.id));
      else if (key === "o" && isPlain && one) take(() => commands.open(one.id));
      else if (key === "enter" && isPlain && focused && commands.connectTo(focused.id)) take(() => {});
      else if ((key === "enter" || key === " ") && event.shiftKey && focused) take(() => commands.toggle(focused.id));
      else if (key === "enter" && (event.ctrlKey || event.metaKey) && !target.closest(".image-node")) {
        take(() => !event.repeat && commands.generate(meant));
      } else if ((key === "delete" || key === "backspace") && focused && !focused.selected) take(() => commands.remove([focused]));
      else if (key === "escape" && focused) take(commands.deselect);
      else if (key === "escape") commands.deselect();
    };
    window.addEventListener("keydown", onKey, true);
    return () => window.removeEventListener("keydown", onKey, true);
  }, [nodes, isOpen, commands]);
}
