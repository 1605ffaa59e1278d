import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { Api, IStreamStart } from '../src/api';
import { ApiError } from '../src/api';
import { SandboxesModel } from '../src/model/sandboxes';
import type { ServerEvent } from '../src/forms';
import { sandbox } from './forms';

/** The little of a page that the model needs in Node. */
const page = Object.assign(new EventTarget(), { visibilityState: 'visible' });
Object.assign(globalThis, { document: page, window: globalThis });

/** One attempt to read the event stream, in the hands of the test. */
interface IAttempt {
  readonly signal: AbortSignal;
  readonly open: (start: IStreamStart) => void;
  readonly tell: (event: ServerEvent) => void;
  readonly end: () => void;
  readonly fail: (reason: Error) => void;
}

/** A model whose streams the test plays; `next` waits for the next attempt. */
function followed(): { model: SandboxesModel; next: () => Promise<IAttempt> } {
  const waiting: ((attempt: IAttempt) => void)[] = [];
  const made: IAttempt[] = [];
  const api = {
    events: (signal: AbortSignal, open: IAttempt['open'], tell: IAttempt['tell']) =>
      new Promise<void>((end, fail) => {
        signal.addEventListener('abort', () => {
          fail(new Error('aborted'));
        });
        const attempt = { signal, open, tell, end, fail };
        const waits = waiting.shift();
        if (waits) {
          waits(attempt);
        } else {
          made.push(attempt);
        }
      })
  };
  const model = new SandboxesModel(api as unknown as Api, '/srv');
  model.start();
  const next = (): Promise<IAttempt> =>
    new Promise(resolve => {
      const attempt = made.shift();
      if (attempt) {
        resolve(attempt);
      } else {
        waiting.push(resolve);
      }
    });
  return { model, next };
}

const hello = (...ids: string[]): ServerEvent => ({
  kind: 'hello',
  sandboxes: ids.map(id => sandbox({ id })),
  templates: [],
  version: '1.2.3'
});

test('the model knows what the stream has told, and tells changes on', async () => {
  const { model, next } = followed();
  const told: string[] = [];
  model.told.connect((_, { id }) => told.push(id));
  assert.equal(model.connected, null);
  const stream = await next();
  stream.open({ skew_s: 100 });
  stream.tell(hello('a'));
  stream.tell({ kind: 'sandbox', sandbox: sandbox({ id: 'b', created_at: 2000 }) });
  assert.equal(model.connected, true);
  assert.equal(model.version, '1.2.3');
  assert.equal(model.ofKernel('k1')?.id, 'b');
  assert.deepEqual(told, ['b']);
  assert.ok(Math.abs(model.now() - Date.now() / 1000 - 100) < 1);
  model.dispose();
  assert.ok(stream.signal.aborted);
});

test('a stream that ends is opened again, and its hello replaces what was known', async () => {
  const { model, next } = followed();
  const first = await next();
  first.tell(hello('a'));
  first.end();
  const second = await next();
  assert.equal(model.connected, false);
  assert.equal(model.get('a')?.id, 'a');
  second.tell(hello('b'));
  assert.equal(model.get('a'), null);
  assert.equal(model.connected, true);
  model.dispose();
});

test('why there is no stream is known until there is one', async () => {
  const { model, next } = followed();
  const first = await next();
  first.fail(new ApiError({ code: 'unreachable', message: 'no keeper', hint: 'start it' }));
  const second = await next();
  assert.equal(model.trouble?.hint, 'start it');
  second.open({ skew_s: 0 });
  assert.equal(model.trouble, null);
  model.dispose();
});

test('a page that stays hidden lets its stream go, and has it again when it is seen', async context => {
  const { model, next } = followed();
  const first = await next();
  first.tell(hello('a'));
  context.mock.timers.enable({ apis: ['setTimeout'] });
  page.visibilityState = 'hidden';
  page.dispatchEvent(new Event('visibilitychange'));
  context.mock.timers.tick(19_000);
  assert.ok(!first.signal.aborted);
  context.mock.timers.tick(2_000);
  assert.ok(first.signal.aborted);
  context.mock.timers.reset();
  page.visibilityState = 'visible';
  page.dispatchEvent(new Event('visibilitychange'));
  const second = await next();
  second.tell(hello('b'));
  assert.equal(model.connected, true);
  model.dispose();
});
