/** The header: whether the figures are those of now, the period, and the colours. */
import { useEffect, useState } from "react";
import { PERIODS } from "./board";
import type { Board, Period, Problem } from "./board";
import { clock } from "./format";

interface Props {
  board: Board | undefined;
  problem: Problem | undefined;
  period: Period;
  onPeriod: (period: Period) => void;
  theme: string;
  onTheme: () => void;
}

export function Header({ board, problem, period, onPeriod, theme, onTheme }: Props) {
  const other = theme === "dark" ? "light" : "dark";
  const state = problem ? "away" : board ? "live" : "connecting";
  return (
    <header className="header">
      <span className="brand">
        <svg viewBox="0 0 16 16" width="26" height="26" aria-hidden="true">
          <rect width="16" height="16" rx="4.5" fill="var(--ink)" />
          <circle cx="10.6" cy="5.6" r="1.6" fill="#f0b95b" />
          <path d="M2.6 12.4 6.2 7.6l3.6 4.8zM8.6 12.4l2.2-2.9 2.5 2.9z" fill="var(--paper)" />
        </svg>
        <h1>Image Jobs</h1>
      </span>
      <span className="connection" data-state={state}>
        <i /><span role="status">{{ away: board ? "Old figures" : "No figures", live: "Live", connecting: "Connecting" }[state]}</span>
        {board && <time dateTime={board.at}>{clock(board.at)}</time>}
      </span>
      <fieldset className="periods">
        <legend className="unseen">Period</legend>
        {Object.entries(PERIODS).map(([name, label]) => (
          <label key={name}>
            <input type="radio" name="period" value={name} checked={name === period} onChange={() => onPeriod(name as Period)} />
            <span>{label}</span>
          </label>
        ))}
      </fieldset>
      <button className="button" data-icon="true" onClick={onTheme} aria-label={`Switch to ${other}`} title={`Switch to ${other}`}>
        <svg viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" strokeWidth="1.5" strokeLinecap="round" strokeLinejoin="round" aria-hidden="true">
          <path d={theme === "dark"
            ? "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6M8 1.6v1M8 13.4v1M1.6 8h1M13.4 8h1M3.5 3.5l.7.7M11.8 11.8l.7.7M3.5 12.5l.7-.7M11.8 4.2l.7-.7"
            : "M13.4 9.6A5.8 5.8 0 0 1 6.4 2.6a5.8 5.8 0 1 0 7 7z"} />
        </svg>
      </button>
    </header>
  );
}

/** Follows the system's colour scheme until the user chooses one; the canvas keeps the choice under the same name. */
export function useTheme(): readonly [string, () => void] {
  const [system] = useState(() => matchMedia("(prefers-color-scheme: dark)"));
  const [chosen, setChosen] = useState(() => localStorage.getItem("theme"));
  const [dark, setDark] = useState(() => system.matches); // once: Chromium tells of no change that was read before
  useEffect(() => {
    const onChange = () => setDark(system.matches);
    system.addEventListener("change", onChange);
    return () => system.removeEventListener("change", onChange);
  }, [system]);
  const theme = chosen ?? (dark ? "dark" : "light");
  // While it is rendered, so that charts find the colours they are drawn in.
  document.documentElement.style.colorScheme = theme;
  const toggle = () => {
    const other = theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setChosen(other);
  };
  return [theme, toggle];
}
