import assert from 'node:assert/strict';
import { test } from 'node:test';

import { freeName } from '../src/model/names';

const among =
  (...names: string[]) =>
  (name: string) =>
    names.includes(name);

test('a fork is named after its notebook and takes no name that is there', () => {
  assert.equal(freeName('work.ipynb', among('work.ipynb')), 'work-Fork1.ipynb');
  assert.equal(
    freeName('work.ipynb', among('work-Fork1.ipynb', 'work-Fork2.ipynb')),
    'work-Fork3.ipynb'
  );
  assert.equal(freeName('work', among()), 'work-Fork1');
  assert.equal(freeName('.work', among()), '.work-Fork1');
});

test('a fork of a fork counts on', () => {
  assert.equal(freeName('work-Fork1.ipynb', among('work-Fork1.ipynb')), 'work-Fork2.ipynb');
});
