import assert from 'node:assert/strict';
import { test } from 'node:test';

import { choosable, timeline } from '../src/model/timeline';
import { snapshot } from './forms';

test('a kernel can go back to its own named snapshots and to imported ones, the newest first', () => {
  const found = choosable(
    {
      imports: true,
      snapshots: [
        snapshot({ id: 'old', created_at: 1 }),
        snapshot({ id: 'new', created_at: 3 }),
        snapshot({ id: 'imported', created_at: 2, kernel_id: null }),
        snapshot({ id: 'other', kernel_id: 'k2' }),
        snapshot({ id: 'asleep', kind: 'suspended' }),
        snapshot({ id: 'template', kind: 'template', kernel_id: null })
      ]
    },
    'k1',
    null
  );
  assert.deepEqual(
    found.snapshots.map(({ id }) => id),
    ['new', 'imported', 'old']
  );
  assert.equal(found.imports, true);
});

test('parents that are not listed are passed over, and a circle of them ends', () => {
  const snapshots = [
    snapshot({ id: 'first', created_at: 1 }),
    snapshot({ id: 'asleep', kind: 'suspended', parent: 'first' }),
    snapshot({ id: 'second', created_at: 2, parent: 'asleep' }),
    snapshot({ id: 'a', kind: 'outlived', parent: 'b' }),
    snapshot({ id: 'b', kind: 'outlived', parent: 'a' })
  ];
  const found = choosable({ imports: false, snapshots }, 'k1', 'asleep');
  assert.deepEqual(
    found.snapshots.map(({ parent }) => parent),
    ['first', null]
  );
  assert.equal(found.now, 'first');
  assert.equal(choosable({ imports: false, snapshots }, 'k1', 'a').now, null);
});

/** Each row as what is drawn: * on the line, | passing, ~ a line that begins there; the kernel as it is now first. */
function drawn(...args: Parameters<typeof timeline>): string[] {
  return timeline(...args).map(({ lanes }) =>
    lanes
      .map(({ up, down, dot, begins }) =>
        dot ? '*' : begins ? '~' : up && down ? '|' : up || down ? '?' : ' '
      )
      .join('')
  );
}

test('without going back all is one line, which ends with now', () => {
  const snapshots = [snapshot({ id: 'b' }), snapshot({ id: 'a' })];
  assert.deepEqual(drawn(snapshots, null), ['*', '*', '*']);
  const [now, , last] = timeline(snapshots, null);
  assert.deepEqual([now?.lanes[0]?.up, now?.lanes[0]?.down], [false, true]);
  assert.deepEqual([last?.lanes[0]?.up, last?.lanes[0]?.down], [true, false]);
});

test('going back begins a line at that snapshot, past those that came after it', () => {
  const snapshots = [
    snapshot({ id: 'better', parent: 'begun' }),
    snapshot({ id: 'mistake' }),
    snapshot({ id: 'begun' })
  ];
  assert.deepEqual(drawn(snapshots, 'begun'), [' *', ' *', '*|', '*~']);
  const rows = timeline(snapshots, 'begun');
  assert.deepEqual(
    rows.map(({ parent }) => parent?.id ?? null),
    ['begun', 'begun', null, null]
  );
});

test('a kernel that just went back has a line of its own', () => {
  const snapshots = [snapshot({ id: 'mistake' }), snapshot({ id: 'begun' })];
  assert.deepEqual(drawn(snapshots, 'mistake'), [' *', '*~', '* ']);
});

test('a parent that was removed begins no line that cannot be drawn', () => {
  assert.deepEqual(drawn([snapshot({ id: 'a', parent: 'gone' })], 'gone'), ['*', '*']);
});
