import assert from 'node:assert/strict';
import { test } from 'node:test';

import { EMPTY, ofKernel, ofNotebook, reduce, type IState } from '../src/model/state';
import type { ISandboxInfo } from '../src/forms';
import { sandbox, template } from './forms';

function after(...told: ISandboxInfo[]): IState {
  return told.reduce<IState>(
    (state, one) => reduce(state, { kind: 'sandbox', sandbox: one }),
    EMPTY
  );
}

test('hello replaces all that was known', () => {
  const state = reduce(after(sandbox({ id: 'old' })), {
    kind: 'hello',
    sandboxes: [sandbox({ id: 'new' })],
    templates: [],
    version: null
  });
  assert.deepEqual([...state.sandboxes.keys()], ['new']);
});

test('a change replaces what was told of the same sandbox and leaves the old state alone', () => {
  const before = after(sandbox({ generation: 1 }));
  const state = reduce(before, { kind: 'sandbox', sandbox: sandbox({ generation: 2 }) });
  assert.equal(state.sandboxes.get(sandbox().id)?.generation, 2);
  assert.equal(before.sandboxes.get(sandbox().id)?.generation, 1);
});

test('what has stopped is forgotten, what failed is kept to be explained', () => {
  const failure = { code: 'sandbox_start', message: 'no', hint: '' };
  const state = after(
    sandbox({ id: 'a' }),
    sandbox({ id: 'b' }),
    sandbox({ id: 'a', state: 'stopped' }),
    sandbox({ id: 'b', state: 'failed', error: failure })
  );
  assert.deepEqual([...state.sandboxes.keys()], ['b']);
});

test('failures are not kept without bound, and the oldest go first', () => {
  const failed = Array.from({ length: 60 }, (_, n) =>
    sandbox({ id: `f${n}`, state: 'failed', created_at: n, notebook: `/n${n}` })
  );
  const state = after(sandbox({ id: 'alive', created_at: 0 }), ...failed);
  assert.equal(state.sandboxes.size, 51);
  assert.ok(state.sandboxes.has('alive'));
  assert.ok(!state.sandboxes.has('f9'));
  assert.ok(state.sandboxes.has('f10'));
});

test('templates of one name and different interpreters are two', () => {
  const of = (python: string): Parameters<typeof reduce>[1] => ({
    kind: 'template',
    template: { name: 'default', python, preload: [], status: template(), prepared: 1 }
  });
  assert.equal(reduce(reduce(EMPTY, of('/a')), of('/b')).templates.size, 2);
  assert.equal(reduce(reduce(EMPTY, of('/a')), of('/a')).templates.size, 1);
});

test('the sandbox of a kernel is its latest', () => {
  const state = after(
    sandbox({ id: 'late', created_at: 20 }),
    sandbox({ id: 'early', created_at: 10 }),
    sandbox({ id: 'other', kernel_id: 'k2', created_at: 30 })
  );
  assert.equal(ofKernel(state, 'k1')?.id, 'late');
  assert.equal(ofKernel(state, 'k3'), null);
});

test('of two equally old sandboxes of a kernel the living one counts', () => {
  const state = after(sandbox({ id: 'dead', state: 'failed' }), sandbox({ id: 'alive' }));
  assert.equal(ofKernel(state, 'k1')?.id, 'alive');
});

test('a notebook is found by its path below the root, and only below this root', () => {
  const state = after(
    sandbox({ id: 'ours', notebook: '/home/ada/notes/a/demo.ipynb', created_at: 1 }),
    sandbox({ id: 'theirs', notebook: '/srv/a/demo.ipynb', created_at: 2 })
  );
  assert.equal(ofNotebook(state, 'a/demo.ipynb', '/home/ada/notes')?.id, 'ours');
  assert.equal(ofNotebook(state, 'a/demo.ipynb', '~/notes')?.id, 'ours');
  assert.equal(ofNotebook(state, 'a/demo.ipynb', '/srv/')?.id, 'theirs');
  assert.equal(ofNotebook(state, 'demo.ipynb', '/home/ada/notes'), null);
  assert.equal(ofNotebook(state, '', '/srv'), null);
});

test('a failure goes when its notebook has another sandbox, and does not come back with its end', () => {
  const state = after(
    sandbox({ id: 'failed', state: 'failed', created_at: 1 }),
    sandbox({ id: 'other', state: 'failed', created_at: 1, notebook: '/elsewhere' }),
    sandbox({ id: 'again', created_at: 2 }),
    sandbox({ id: 'again', created_at: 2, state: 'stopped' })
  );
  assert.deepEqual([...state.sandboxes.keys()], ['other']);
});
