import type { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { IRenderMime } from '@jupyterlab/rendermime-interfaces';
import type { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import {
  duration,
  type IRank,
  type IRanks,
  isOpen,
  lastLine,
  RANKS_TYPE,
  readRanks,
  stateName,
  summary,
  worked
} from '../model/ranks';
import * as words from '../model/words';
import { RankPart } from './rankPart';

export interface IRanksOptions {
  /** Draws what ranks display. */
  readonly rendermime: IRenderMimeRegistry;
  readonly trans: TranslationBundle;
}

/**
 * What the ranks of one remote cell show: a line for each with its state, time and memory, its output below.
 */
export class Ranks extends ReactWidget implements IRenderMime.IRenderer {
  constructor(options: IRanksOptions) {
    super();
    this._options = options;
    this.addClass('wc-Ranks');
  }

  async renderModel(model: IRenderMime.IMimeModel): Promise<void> {
    this._all = readRanks(model.data[RANKS_TYPE]);
    this._isTrusted = model.trusted;
    if (this.isAttached) {
      this.update();
      await this.renderPromise;
    }
  }

  protected override render(): React.JSX.Element | null {
    const all = this._all;
    if (all === null) {
      return null;
    }
    const { trans, rendermime } = this._options;
    const areOpen = all.ranks.some(rank => this._isOpen(rank, all));
    return (
      <>
        <div className="wc-Ranks-summary" data-state={all.state}>
          <span role="status" aria-live="off">
            {summary(all, trans)}
          </span>
          <button
            type="button"
            className="wc-Ranks-fold"
            onClick={() => {
              this._toggleAll(all, !areOpen);
            }}
          >
            {areOpen ? trans.__('Fold all') : trans.__('Unfold all')}
          </button>
        </div>
        {all.ranks.map(rank => {
          const open = this._isOpen(rank, all);
          return (
            <details
              key={rank.rank}
              className="wc-Rank"
              data-rank={rank.rank}
              data-state={rank.state}
              open={open}
            >
              <summary
                className="wc-Rank-head"
                onClick={event => {
                  event.preventDefault();
                  this._toggle(rank, !open);
                }}
              >
                <RankHead rank={rank} all={all} isOpen={open} trans={trans} />
              </summary>
              {open && (
                <div className="wc-Rank-body">
                  {rank.isCut && (
                    <p className="wc-Rank-note">{trans.__('Earlier output is no longer kept.')}</p>
                  )}
                  {rank.parts.map((part, index) => (
                    <RankPart
                      key={index}
                      part={part}
                      isTrusted={this._isTrusted}
                      rendermime={rendermime}
                    />
                  ))}
                  {rank.error !== '' && <p className="wc-Rank-error">{rank.error}</p>}
                  {rank.parts.length === 0 && rank.error === '' && (
                    <p className="wc-Rank-note">{trans.__('No output')}</p>
                  )}
                </div>
              )}
            </details>
          );
        })}
      </>
    );
  }

  private _isOpen(rank: IRank, all: IRanks): boolean {
    return this._folds.get(rank.rank) ?? isOpen(rank, all);
  }

  private _toggle(rank: IRank, open: boolean): void {
    this._folds.set(rank.rank, open);
    this.update();
  }

  private _toggleAll(all: IRanks, open: boolean): void {
    for (const { rank } of all.ranks) {
      this._folds.set(rank, open);
    }
    this.update();
  }

  private readonly _options: IRanksOptions;
  private readonly _folds = new Map<number, boolean>();
  private _all: IRanks | null = null;
  private _isTrusted = false;
}

interface IHeadProps {
  readonly rank: IRank;
  readonly all: IRanks;
  readonly isOpen: boolean;
  readonly trans: TranslationBundle;
}

/** One rank in a line. */
function RankHead({ rank, all, isOpen, trans }: IHeadProps): React.JSX.Element {
  const about = isOpen ? '' : lastLine(rank);
  const vram =
    rank.vram_bytes > 0 ? trans.__('%1 of GPU memory', words.bytes(rank.vram_bytes)) : '';
  const tasks = rank.tasks > 1 ? trans._n('%1 task', '%1 tasks', rank.tasks) : '';
  return (
    <>
      <span className="wc-Rank-name">{trans.__('Rank %1', rank.rank)}</span>
      <span className="wc-Rank-state">{stateName(rank.state, trans)}</span>
      <span className="wc-Rank-track" role="img" aria-label={worked(rank, all, trans)}>
        {rank.spans.map(({ from_pct, width_pct, state }, index) => (
          <span
            key={index}
            className="wc-Rank-bar"
            data-state={state}
            style={{ left: `${from_pct}%`, width: `${width_pct}%` }}
          />
        ))}
      </span>
      <span className="wc-Rank-figure">{duration(rank.seconds, trans)}</span>
      <span className="wc-Rank-figure wc-Rank-memory">
        {rank.memory_bytes > 0 ? words.bytes(rank.memory_bytes) : ''}
      </span>
      <span className="wc-Rank-about" title={about}>
        {[rank.device, vram, rank.label, tasks, about].filter(Boolean).join(' · ')}
      </span>
    </>
  );
}
