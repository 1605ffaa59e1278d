import assert from 'node:assert/strict';
import { test } from 'node:test';

import { clonesOf } from '../src/model/clones';
import { sandbox } from './forms';

const OURS = sandbox({ id: 'source', kernel_id: 'k1' });
const clone = (id: string, change = {}): ReturnType<typeof sandbox> =>
  sandbox({ id, kernel_id: `k-${id}`, owner: 'fork', parent: 'source', ...change });

const isListed = (id: string): boolean => id === 'k1' || id === 'k-opened';

test('clones of a kernel of this server are found, and clones of clones, the eldest first', () => {
  const sandboxes = [
    clone('second', { parent: 'first', created_at: 3000 }),
    OURS,
    clone('first', { created_at: 2000 })
  ];
  const found = clonesOf(sandboxes, isListed);
  assert.deepEqual(
    found.map(({ sandbox: { id }, source }) => [id, source.id]),
    [
      ['first', 'source'],
      ['second', 'source']
    ]
  );
});

test('what has ended, is listed already, or belongs to another server is none of them', () => {
  const sandboxes = [
    OURS,
    clone('opened'),
    clone('ended', { state: 'failed' }),
    clone('remote', { owner: 'remote' }),
    sandbox({ id: 'theirs', kernel_id: 'k9' }),
    clone('of another server', { parent: 'theirs' }),
    clone('orphan', { parent: 'gone' })
  ];
  assert.deepEqual(clonesOf(sandboxes, isListed), []);
});
