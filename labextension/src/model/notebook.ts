import type { ISessionContext } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import type { Kernel, KernelSpec } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { IDisposable } from '@lumino/disposable';
import { type ISignal, Signal } from '@lumino/signaling';

import type { IChoice, ISandboxInfo } from '../forms';
import type { ISandboxes } from '../tokens';
import { METADATA_KEY, readChoice, writeChoice } from './choice';
import { glance, type IGlance } from './glance';
import { type INotice, notices } from './notices';
import { isStartingStatus, isTicking, type ISituation } from './situation';

const PROVISIONER = 'warmcell';

const TICK_MS = 1000;

/** A sandbox that was made this long before its notebook began to start a kernel belongs to an earlier start. */
const EARLIER_S = 5;

const ofContext = new WeakMap<ISessionContext, NotebookSandbox>();

/** Whether a kernelspec's kernels run in Warmcell sandboxes. */
export function isOurs(spec: KernelSpec.ISpecModel | undefined): boolean {
  const provisioner = spec?.metadata?.kernel_provisioner;
  return (
    typeof provisioner === 'object' &&
    provisioner !== null &&
    'provisioner_name' in provisioner &&
    provisioner.provisioner_name === PROVISIONER
  );
}

/**
 * One notebook's kernel and its sandbox: what to show, and how to start it again.
 */
export class NotebookSandbox implements IDisposable {
  /** The one of this session: its toolbar item, its banner and its dialog share it. */
  static of(
    panel: NotebookPanel,
    sandboxes: ISandboxes,
    trans: TranslationBundle
  ): NotebookSandbox {
    const found =
      ofContext.get(panel.sessionContext) ?? new NotebookSandbox(panel, sandboxes, trans);
    ofContext.set(panel.sessionContext, found);
    return found;
  }

  /**
   * @param panel - The notebook; this ends with its session.
   * @param sandboxes - What is known about sandboxes.
   * @param trans - The translation of this package.
   */
  constructor(panel: NotebookPanel, sandboxes: ISandboxes, trans: TranslationBundle) {
    const context = (this.context = panel.sessionContext);
    this._panel = panel;
    this.sandboxes = sandboxes;
    this.trans = trans;
    this._startingSince = sandboxes.now();
    sandboxes.changed.connect(this._update, this);
    context.kernelChanged.connect(this._update, this);
    context.sessionChanged.connect(this._update, this);
    context.statusChanged.connect(this._update, this);
    context.connectionStatusChanged.connect(this._update, this);
    context.propertyChanged.connect(this._update, this);
    context.specsManager.specsChanged.connect(this._update, this);
    panel.model?.metadataChanged.connect(this._update, this);
    context.disposed.connect(this.dispose, this);
    this._update();
  }

  readonly context: ISessionContext;
  readonly sandboxes: ISandboxes;
  readonly trans: TranslationBundle;

  /** Emitted when what is to be shown may have changed; once a second while something is awaited. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  /** What is known now. */
  get situation(): ISituation {
    const { context, sandboxes } = this;
    const kernelName = this._kernelName();
    return {
      kernelName,
      ours: kernelName !== null && isOurs(context.specsManager.specs?.kernelspecs[kernelName]),
      hasKernel: Boolean(context.session?.kernel),
      status: context.kernelDisplayStatus,
      sandbox: this.sandbox,
      choice: this.choice,
      connected: sandboxes.connected,
      trouble: sandboxes.trouble,
      now: sandboxes.now(),
      startingSince: this._startingSince,
      nameOf: id => sandboxes.get(id)?.notebook?.split('/').pop() ?? null
    };
  }

  /** The sandbox of this notebook's kernel: that which runs, or that which failed to. */
  get sandbox(): ISandboxInfo | null {
    return this._known ?? this._failure;
  }

  /** The kernel that can be restarted, if there is one. */
  get kernel(): Kernel.IKernelConnection | null {
    const kernel = this.context.session?.kernel ?? null;
    return kernel?.status === 'dead' ? null : kernel;
  }

  /** What the notebook remembers that it asks for. */
  get choice(): IChoice {
    return readChoice(this._panel.model?.getMetadata(METADATA_KEY));
  }

  get glance(): IGlance {
    return glance(this.situation, this.trans);
  }

  get notices(): INotice[] {
    return notices(this.situation, this.trans);
  }

  /**
   * Start the kernel again: in place where there is one, else a new one.
   *
   * @throws if no kernel could be started; JupyterLab has shown the reason.
   */
  async restart(): Promise<void> {
    if (this.kernel !== null) {
      await this.context.restartKernel();
      return;
    }
    const name = this._kernelName();
    await this.context.changeKernel(name === null ? {} : { name });
  }

  /** The notebook as it is in the page, saved or not. */
  content(): unknown {
    return this._panel.model?.toJSON();
  }

  /** Have the notebook remember a choice. */
  remember(choice: IChoice): void {
    this._panel.model?.setMetadata(METADATA_KEY, writeChoice(choice));
  }

  /**
   * Restart the kernel with a choice that the notebook remembers.
   *
   * @throws ApiError if the server refuses; the kernel is as it was.
   */
  async apply(choice: IChoice): Promise<void> {
    if (this.kernel !== null) {
      await this.sandboxes.configure(this.kernel.id, choice);
    } else {
      // There is no kernel to be configured; a new one gets what its notebook remembers on disk.
      await this._panel.context.save();
    }
    await this.restart();
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    window.clearInterval(this._ticker);
    Signal.clearData(this);
  }

  /** The sandbox as far as the server knows one. */
  private get _known(): ISandboxInfo | null {
    const kernelId = this.context.session?.kernel?.id;
    if (kernelId !== undefined) {
      return this.sandboxes.ofKernel(kernelId);
    }
    // A kernel has no id before it has started, and none after its first start failed.
    const asked = this.sandboxes.ofNotebook(this.context.path);
    return asked !== null && asked.created_at >= this._startingSince - EARLIER_S ? asked : null;
  }

  /** The server forgets after some minutes why a start failed. Its notebook says it until there is another start. */
  private _keepFailure(): void {
    const known = this._known;
    const kernelId = this.context.session?.kernel?.id;
    if (known !== null) {
      this._failure = known.state === 'failed' ? known : null;
    } else if (kernelId !== undefined && kernelId !== this._failure?.kernel_id) {
      this._failure = null;
    }
  }

  private _kernelName(): string | null {
    const { session, specsManager, kernelPreference } = this.context;
    if (session?.kernel) {
      return session.kernel.name;
    }
    const specs = Object.values(specsManager.specs?.kernelspecs ?? {});
    const pending = specs.find(spec => spec?.display_name === this.context.kernelDisplayName);
    if (pending !== undefined) {
      return pending.name;
    }
    if (this.context.kernelDisplayStatus === 'initializing') {
      return kernelPreference.name ?? null;
    }
    return this.sandbox?.state === 'failed' ? this._attempted : null;
  }

  private _update(): void {
    if (this._isDisposed) {
      return;
    }
    const status = this.context.kernelDisplayStatus;
    const isStarting = isStartingStatus(status);
    if (isStarting && !this._wasStarting) {
      this._startingSince = this.sandboxes.now();
      this._failure = null;
    }
    this._wasStarting = isStarting;
    this._keepFailure();
    const { situation } = this;
    if (situation.ours) {
      this._attempted = situation.kernelName;
      this._comeBack(situation);
    }
    this._tick(isTicking(situation));
    this._changed.emit();
  }

  /**
   * Connect to the kernel as soon as the server that was away is back. JupyterLab waits longer with each attempt, and
   * gives up after seven.
   */
  private _comeBack({ connected, sandbox }: ISituation): void {
    if (connected === false) {
      this._wasAway = true;
    } else if (connected === true && this._wasAway && sandbox !== null) {
      this._wasAway = false;
      const kernel = this.context.session?.kernel;
      if (kernel && !kernel.isDisposed && kernel.connectionStatus !== 'connected') {
        kernel.reconnect().catch(() => {
          // Its status says so.
        });
      }
    }
  }

  private _tick(wanted: boolean): void {
    if (wanted && this._ticker === 0) {
      this._ticker = window.setInterval(() => {
        this._update();
      }, TICK_MS);
    } else if (!wanted) {
      window.clearInterval(this._ticker);
      this._ticker = 0;
    }
  }

  private readonly _panel: NotebookPanel;
  private readonly _changed = new Signal<this, void>(this);
  private _isDisposed = false;
  private _ticker = 0;
  private _startingSince: number;
  private _wasStarting = false;
  private _wasAway = false;
  /** Why the last start failed, if it did. */
  private _failure: ISandboxInfo | null = null;
  /** The last kernelspec of ours that was to be started. */
  private _attempted: string | null = null;
}
