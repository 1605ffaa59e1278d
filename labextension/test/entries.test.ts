import assert from 'node:assert/strict';
import { test } from 'node:test';

import { entries, type IEntry, type ISurroundings } from '../src/model/entries';
import type { ISandboxInfo, IUsage } from '../src/forms';
import { GIB, device, sandbox, trans, usage } from './forms';

const PATHS: Readonly<Record<string, string>> = { k1: 'notes/demo.ipynb' };

function rows(
  sandboxes: readonly ISandboxInfo[],
  usages: Readonly<Record<string, IUsage>> = {},
  paths = PATHS
): IEntry[] {
  const around: ISurroundings = {
    pathOf: id => paths[id ?? ''] ?? null,
    usageOf: id => usages[id] ?? null,
    now: 1000 + 2 * 3600
  };
  return entries(sandboxes, around, trans);
}

const row = (change: Partial<ISandboxInfo> = {}, used?: IUsage): IEntry => {
  const [only] = rows([sandbox(change)], used ? { [sandbox().id]: used } : {});
  assert.ok(only);
  return only;
};

test('a notebook’s sandbox has its name, and says whose it is, on what it runs, its age and its rest', () => {
  const shown = row({ gpus: [device()] }, usage({ idle_s: 300 }));
  assert.equal(shown.name, 'demo.ipynb');
  assert.equal(shown.path, 'notes/demo.ipynb');
  assert.equal(shown.state, 'running');
  assert.deepEqual(shown.facts, ['notebook', 'A100-80GB', '2 h old', 'idle 5 min']);
  assert.deepEqual(shown.actions, ['park', 'suspend', 'snapshot', 'fork', 'port', 'stop']);
  assert.deepEqual(row().actions, ['suspend', 'snapshot', 'fork', 'port', 'stop']);
});

test('one that works is busy and not idle', () => {
  const shown = row({}, usage({ busy: true, idle_s: 0 }));
  assert.deepEqual([shown.tone, shown.state], ['busy', 'busy']);
  assert.ok(!shown.facts.some(fact => fact.startsWith('idle')));
});

test('a suspended one can go on, and says what it gets then', () => {
  const shown = row({ state: 'suspended', gpu: 'A100' });
  assert.deepEqual([shown.tone, shown.state], ['resting', 'suspended']);
  assert.deepEqual(shown.actions, ['resume', 'fork', 'stop']);
  assert.ok(shown.facts.includes('A100'));
});

test('a parked one can go on, be suspended too, and says what it gets then', () => {
  const shown = row({ parked: { since: 1, vram_bytes: GIB, stays_bytes: 0 }, gpu: 'A100' });
  assert.deepEqual([shown.tone, shown.state], ['resting', 'parked']);
  assert.deepEqual(shown.actions, ['resume', 'suspend', 'snapshot', 'fork', 'port', 'stop']);
  assert.ok(shown.facts.includes('A100'));
});

test('one in the queue says its place and can leave', () => {
  const queue = { request: 'A100', place: 2, length: 3, since: 0, estimate_s: null, why: '' };
  const shown = row({ state: 'creating', generation: 0, queue });
  assert.equal(shown.state, 'queued, place 2 of 3');
  assert.deepEqual(shown.actions, ['cancel']);
});

test('a start says what it is busy with; a failure can only be removed', () => {
  const phase = { name: 'restore', since: 0, detail: '', hint: '' };
  assert.equal(row({ state: 'creating', phase }).state, 'starting: restore');
  const failed = row({ state: 'failed' });
  assert.deepEqual([failed.tone, failed.state, failed.actions], ['failed', 'failed', ['stop']]);
});

test('a sandbox without a kernel has no start to wait for and no kernel to fork', () => {
  const shown = row({ owner: 'client', kernel_id: null, notebook: null, generation: 0 });
  assert.deepEqual([shown.name, shown.tone], ['Sandbox abc123def456', 'running']);
  assert.deepEqual(shown.actions, ['suspend', 'snapshot', 'port', 'stop']);
});

test('whoever asks for sandboxes in days to come has rows too', () => {
  const shown = row({ owner: 'swarm', kernel_id: null, notebook: null });
  assert.equal(shown.facts[0], 'swarm');
});

test('a clone is called after the notebook that it comes from, over any number of clones', () => {
  const made = (id: string, parent: string): ISandboxInfo =>
    sandbox({ id, parent, owner: 'fork', kernel_id: `k-${id}`, notebook: null });
  const shown = rows([sandbox({ id: 'source' }), made('one', 'source'), made('two', 'one')]);
  assert.deepEqual(
    shown.filter(({ isClone }) => isClone).map(({ name, path }) => [name, path]),
    [
      ['Clone of demo.ipynb', 'notes/demo.ipynb'],
      ['Clone of demo.ipynb', 'notes/demo.ipynb']
    ]
  );
});

test('a clone that was opened is a notebook, an orphan cannot be opened, and a circle ends', () => {
  const clone = sandbox({ id: 'one', parent: 'gone', owner: 'fork', notebook: null });
  const [opened] = rows([clone]);
  assert.deepEqual([opened?.name, opened?.isClone], ['demo.ipynb', false]);
  const [orphan] = rows([clone], {}, {});
  assert.deepEqual([orphan?.name, orphan?.path], ['Clone of a kernel', null]);
  const circle = [sandbox({ id: 'a', parent: 'b' }), sandbox({ id: 'b', parent: 'a' })];
  assert.equal(rows(circle, {}, {}).length, 2);
});

test('the youngest is first', () => {
  const shown = rows([sandbox({ id: 'old', created_at: 1 }), sandbox({ id: 'new' })]);
  assert.deepEqual(
    shown.map(entry => entry.sandbox.id),
    ['new', 'old']
  );
});
