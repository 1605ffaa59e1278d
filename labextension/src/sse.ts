/** One event of a `text/event-stream`. */
export interface IStreamEvent {
  readonly kind: string;
  readonly data: string;
}

/**
 * Cuts a `text/event-stream` into events, whatever the pieces in which it arrives.
 */
export class EventParser {
  /** The events that are complete with this piece. */
  push(piece: string): IStreamEvent[] {
    const found: IStreamEvent[] = [];
    this._rest += piece;
    for (;;) {
      const end = /\r\n|\n|\r(?!$)/.exec(this._rest);
      if (end === null) {
        return found;
      }
      this._line(this._rest.slice(0, end.index), found);
      this._rest = this._rest.slice(end.index + end[0].length);
    }
  }

  private _line(line: string, found: IStreamEvent[]): void {
    if (line === '') {
      if (this._data.length > 0) {
        found.push({ kind: this._kind || 'message', data: this._data.join('\n') });
      }
      this._kind = '';
      this._data = [];
      return;
    }
    const colon = line.indexOf(':');
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '');
    if (name === 'event') {
      this._kind = value;
    } else if (name === 'data') {
      this._data.push(value);
    }
  }

  private _rest = '';
  private _kind = '';
  private _data: string[] = [];
}
