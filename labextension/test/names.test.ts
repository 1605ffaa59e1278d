import assert from 'node:assert/strict';
import { test } from 'node:test';

import { freeName } from '../src/model/names';

test('a fork is named after its notebook and takes no name that is there', () => {
  assert.equal(freeName('work.ipynb', ['work.ipynb']), 'work-Fork1.ipynb');
  assert.equal(
    freeName('work.ipynb', ['work-Fork1.ipynb', 'work-Fork2.ipynb']),
    'work-Fork3.ipynb'
  );
  assert.equal(freeName('work', []), 'work-Fork1');
  assert.equal(freeName('.work', []), '.work-Fork1');
});

test('a fork of a fork counts on', () => {
  assert.equal(freeName('work-Fork1.ipynb', ['work-Fork1.ipynb']), 'work-Fork2.ipynb');
});
