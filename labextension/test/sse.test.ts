import assert from 'node:assert/strict';
import { test } from 'node:test';

import { EventParser, type IStreamEvent } from '../src/sse';

const STREAM =
  ': still here\n\nevent: sandbox\ndata: {"id":\ndata: "a"}\n\nevent: template\r\ndata: x\r\n\r\ndata: plain\n\n';
const EVENTS: IStreamEvent[] = [
  { kind: 'sandbox', data: '{"id":\n"a"}' },
  { kind: 'template', data: 'x' },
  { kind: 'message', data: 'plain' }
];

test('events are the same in whatever pieces they arrive', () => {
  for (let size = 1; size <= STREAM.length; size++) {
    const parser = new EventParser();
    const found: IStreamEvent[] = [];
    for (let at = 0; at < STREAM.length; at += size) {
      found.push(...parser.push(STREAM.slice(at, at + size)));
    }
    assert.deepEqual(found, EVENTS, `in pieces of ${size}`);
  }
});

test('an event without its empty line is not yet one', () => {
  const parser = new EventParser();
  assert.deepEqual(parser.push('event: sandbox\ndata: x\n'), []);
  assert.deepEqual(parser.push('\n'), [{ kind: 'sandbox', data: 'x' }]);
});
