import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';

import { VERSION } from '../src/version';

test('the page has the version of its package and of the Python distribution', () => {
  const manifest = JSON.parse(readFileSync('package.json', 'utf-8')) as { version: string };
  const project = /^version = "([^"]+)"$/m.exec(readFileSync('pyproject.toml', 'utf-8'));
  assert.equal(VERSION, manifest.version);
  assert.equal(VERSION, project?.[1]);
});
