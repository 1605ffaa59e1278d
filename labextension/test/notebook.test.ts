import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { NotebookPanel } from '@jupyterlab/notebook';
import { Signal } from '@lumino/signaling';

import type { ISandboxInfo } from '../src/forms';
import { NotebookSandbox } from '../src/model/notebook';
import { ofKernel, ofNotebook, reduce, EMPTY } from '../src/model/state';
import type { ISandboxes } from '../src/tokens';
import { sandbox, trans } from './forms';

Object.assign(globalThis, { window: globalThis });

const OURS = { metadata: { kernel_provisioner: { provisioner_name: 'warmcell' } } };
const PATH = 'notes/demo.ipynb';

/** A notebook without a kernel, as JupyterLab and the server tell of it in the hands of the test. */
class Told {
  constructor() {
    this.notebook = new NotebookSandbox(
      this._panel as unknown as NotebookPanel,
      this._sandboxes as unknown as ISandboxes,
      trans
    );
  }

  readonly notebook: NotebookSandbox;

  /** JupyterLab says what its kernel does, and which one it is. */
  says(status: string, kernelId?: string): void {
    this._context.kernelDisplayStatus = status;
    this._context.session =
      kernelId === undefined ? null : { kernel: { id: kernelId, name: 'warmcell' } };
    this._context.statusChanged.emit();
  }

  /** The server tells of a sandbox. */
  tells(change: Partial<ISandboxInfo>): void {
    this._state = reduce(this._state, { kind: 'sandbox', sandbox: sandbox(change) });
    this._sandboxes.changed.emit();
  }

  private _state = EMPTY;
  private readonly _context = {
    path: PATH,
    session: null as { kernel: { id: string; name: string } } | null,
    kernelDisplayStatus: 'initializing',
    kernelDisplayName: 'Warmcell',
    kernelPreference: { name: 'warmcell' },
    specsManager: {
      specs: { kernelspecs: { warmcell: { ...OURS, name: 'warmcell', display_name: 'Warmcell' } } },
      specsChanged: signal()
    },
    kernelChanged: signal(),
    sessionChanged: signal(),
    statusChanged: signal(),
    connectionStatusChanged: signal(),
    propertyChanged: signal(),
    disposed: signal()
  };
  private readonly _panel = {
    sessionContext: this._context,
    model: { metadataChanged: signal(), getMetadata: () => undefined }
  };
  private readonly _sandboxes = {
    changed: signal(),
    connected: true,
    trouble: null,
    now: () => 1000,
    get: () => null,
    ofKernel: (id: string) => ofKernel(this._state, id),
    ofNotebook: (path: string) => ofNotebook(this._state, path, '/home/ada')
  };
}

function signal(): Signal<unknown, void> {
  return new Signal({});
}

const FAILED = {
  id: 'first',
  state: 'failed',
  kernel_id: 'k1',
  error: { code: 'no_bwrap', message: 'There is no bwrap', hint: '' }
} as const;

test('why a start failed is said as long as there is no other, though the server has forgotten it', () => {
  const told = new Told();
  told.tells(FAILED);
  told.says('unknown');
  told.tells({ ...FAILED, state: 'stopped' });
  assert.equal(told.notebook.glance.kind, 'failed');
  assert.match(told.notebook.notices[0]?.text ?? '', /There is no bwrap/);

  told.says('starting');
  assert.deepEqual([told.notebook.glance.kind, told.notebook.notices], ['starting', []]);
  told.tells({ id: 'second', kernel_id: 'k2' });
  told.says('idle', 'k2');
  assert.equal(told.notebook.glance.kind, 'running');
  told.tells({ id: 'second', kernel_id: 'k2', state: 'stopped' });
  assert.equal(told.notebook.glance.kind, 'unknown');
  told.notebook.dispose();
});

test('why one kernel failed is not said of another', () => {
  const told = new Told();
  told.says('idle', 'k1');
  told.tells(FAILED);
  told.tells({ ...FAILED, state: 'stopped' });
  assert.equal(told.notebook.glance.kind, 'failed');
  told.says('idle', 'k2');
  assert.equal(told.notebook.glance.kind, 'unknown');
  told.notebook.dispose();
});
