/** A table that is one for a screen reader at every width: on a phone each row is a card, and the roles stay. */
import type { ReactNode } from "react";

export interface Row {
  key: string;
  cells: readonly ReactNode[];
  /** Of the style sheet. */
  level?: "group" | "part";
}

/** The column of buttons: its name is for screen readers. */
export const ACTIONS = "Actions";

interface Props {
  name: string;
  columns: readonly string[];
  rows: readonly Row[];
  /** Columns of numbers, by their place: they stand at the right. */
  numbers?: readonly number[];
  className?: string;
}

export function Table({ name, columns, rows, numbers = [], className = "" }: Props) {
  const number = (index: number) => numbers.includes(index) || undefined;
  return (
    <table role="table" className={className} aria-label={name}>
      <thead role="rowgroup">
        <tr role="row">
          {columns.map((column, index) => <th key={column} role="columnheader" scope="col" data-number={number(index)}>
              {column === ACTIONS ? <span className="unseen">{column}</span> : column}
            </th>)}
        </tr>
      </thead>
      <tbody role="rowgroup">
        {rows.map(row => (
          <tr key={row.key} role="row" data-level={row.level}>
            {row.cells.map((cell, index) => index === 0
              ? <th key={columns[0]} role="rowheader" scope="row">{cell}</th>
              : <td key={columns[index]} role="cell" data-label={columns[index]} data-number={number(index)} data-actions={columns[index] === ACTIONS || undefined}
                  data-empty={cell === "" || cell === null || undefined}>{cell}</td>)}
          </tr>
        ))}
      </tbody>
    </table>
  );
}
