import { LabIcon } from '@jupyterlab/ui-components';

/** A cell with a warm core: a kernel in its sandbox. */
export const sandboxIcon = new LabIcon({
  name: 'warmcell:sandbox',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <path class="jp-icon3" fill="#616161" fill-rule="evenodd" d="M12 2l8.66 5v10L12 22l-8.66-5V7L12 2zm0 2.3L5.34 8.15v7.7L12 19.7l6.66-3.85v-7.7L12 4.3z"/>
  <circle class="jp-icon-warn0" fill="#F57C00" cx="12" cy="12" r="3.6"/>
</svg>`
});

/** The same with a cold core: no sandbox. */
export const noSandboxIcon = new LabIcon({
  name: 'warmcell:no-sandbox',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <g fill="none"><path class="jp-icon3" stroke="#616161" stroke-width="2" stroke-dasharray="3.2 2.4" d="M12 3l7.8 4.5v9L12 21l-7.8-4.5v-9L12 3z"/></g>
</svg>`
});

/** The same with a hollow core: its memory is on disk. */
export const suspendedIcon = new LabIcon({
  name: 'warmcell:suspended',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <path class="jp-icon3" fill="#616161" fill-rule="evenodd" d="M12 2l8.66 5v10L12 22l-8.66-5V7L12 2zm0 2.3L5.34 8.15v7.7L12 19.7l6.66-3.85v-7.7L12 4.3z"/>
  <path class="jp-icon3" fill="#616161" d="M9.2 8.6h2v6.8h-2zM12.8 8.6h2v6.8h-2z"/>
</svg>`
});

/** One line that becomes two. */
export const forkIcon = new LabIcon({
  name: 'warmcell:fork',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <g fill="none"><path class="jp-icon3" stroke="#616161" stroke-width="2" d="M6 7.5v9M6 14c0-4 12-1 12-6"/></g>
  <g class="jp-icon3" fill="#616161"><circle cx="6" cy="5" r="2.6"/><circle cx="6" cy="19" r="2.6"/><circle cx="18" cy="6" r="2.6"/></g>
</svg>`
});

/** A GPU that is given back: a board, and an arrow that leaves it. */
export const parkIcon = new LabIcon({
  name: 'warmcell:park',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <path class="jp-icon3" fill="#616161" d="M3 4v17h2v-4h14a2 2 0 0 0 2-2v-3h-2v3H5V8h6V6H5V4H3zM7 10h4v3H7z"/>
  <path class="jp-icon3" fill="#616161" d="M17 2l4 4-4 4V7.2h-4V4.8h4V2z"/>
</svg>`
});

/** A cell that did not come up. */
export const failedIcon = new LabIcon({
  name: 'warmcell:failed',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <path class="wc-fill-error" fill="#D32F2F" fill-rule="evenodd" d="M12 2l8.66 5v10L12 22l-8.66-5V7L12 2zM10.9 7v6h2.2V7h-2.2zM10.9 15v2.2h2.2V15h-2.2z"/>
</svg>`
});
