import assert from 'node:assert/strict';
import { test } from 'node:test';

import { duration, isOpen, lastLine, readRanks, summary, worked } from '../src/model/ranks';
import { trans } from './forms';

const RANK = { rank: 0, state: 'done', device: 'A100', seconds: 4, parts: [], spans: [] };

test('a fan-out is read as it is told', () => {
  const all = readRanks({
    state: 'failed',
    seconds: 10,
    worked_s: 14,
    gpus_each: 2,
    sent_bytes: 3 * 2 ** 20,
    ranks: [
      { ...RANK, spans: [[0, 4, 'done']], parts: [{ name: 'stderr', text: 'hm' }] },
      { ...RANK, rank: 1, state: 'failed', seconds: 10, error: 'ValueError: no', cut: true },
      { ...RANK, rank: 2, parts: [{ data: { 'text/plain': 'x' }, metadata: { a: 1 } }] }
    ]
  });
  assert.equal(
    summary(all, trans),
    '3 ranks: 1 failed, 2 done · 10 s · 28 GPU-seconds · 3 MiB sent'
  );
  const [first, second, third] = all.ranks;
  assert.ok(first && second && third);
  assert.deepEqual(first.spans, [{ from_pct: 0, width_pct: 40, state: 'done' }]);
  assert.deepEqual(first.parts, [{ kind: 'text', name: 'stderr', text: 'hm' }]);
  assert.deepEqual(third.parts, [
    { kind: 'data', data: { 'text/plain': 'x' }, metadata: { a: 1 } }
  ]);
  assert.equal(second.isCut, true);
  assert.equal(worked(first, all, trans), 'Worked 4.0 s of 10 s');
});

test('whatever a notebook says is read', () => {
  for (const wrong of [
    null,
    7,
    [],
    { ranks: 'x' },
    { ranks: [null, {}] },
    { ranks: [{ spans: [1, [5]], parts: [3] }], seconds: -1 }
  ]) {
    const all = readRanks(wrong);
    assert.ok(summary(all, trans).includes('rank'));
    for (const rank of all.ranks) {
      assert.equal(rank.state, 'waits');
      assert.ok(rank.spans.every(span => span.from_pct === 0 && span.width_pct === 0));
    }
  }
});

test('ranks that say something are unfolded, of many only those that have failed', () => {
  const says = { ...RANK, parts: [{ name: 'stdout', text: 'x' }] };
  const few = readRanks({ ranks: [says, RANK, { ...RANK, state: 'failed', error: 'E' }] });
  assert.deepEqual(
    few.ranks.map(rank => isOpen(rank, few)),
    [true, false, true]
  );
  const many = readRanks({
    ranks: [...Array<unknown>(9).fill(says), { ...says, state: 'failed' }]
  });
  assert.deepEqual(
    many.ranks.map(rank => isOpen(rank, many)),
    [...Array<boolean>(9).fill(false), true]
  );
});

test('a folded rank shows its error, or the last line that it has printed', () => {
  const line = (told: object): string => {
    const [rank] = readRanks({ ranks: [{ ...RANK, ...told }] }).ranks;
    assert.ok(rank);
    return lastLine(rank);
  };
  const parts = [
    { name: 'stdout', text: 'one\n\x1b[31mtwo\x1b[0m\n\n' },
    { data: { 'text/plain': 'x' } }
  ];
  assert.equal(line({ parts }), 'two');
  assert.equal(line({ parts, error: 'ValueError: no' }), 'ValueError: no');
  assert.equal(line({}), '');
});

test('times are short', () => {
  assert.deepEqual(
    [0.04, 9.9, 59.9, 61, 7384].map(amount => duration(amount, trans)),
    ['0.0 s', '9.9 s', '60 s', '1 min 1 s', '2 h 3 min']
  );
});
