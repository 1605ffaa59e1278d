/** The name of a fork of this notebook that is not taken: "work-Fork1.ipynb"; a fork's forks count on. */
export function freeName(name: string, isTaken: (name: string) => boolean): string {
  const dot = name.lastIndexOf('.');
  const [stem, extension] = dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ''];
  const base = stem.replace(/-Fork\d+$/, '');
  for (let count = 1; ; count += 1) {
    const candidate = `${base}-Fork${count}${extension}`;
    if (!isTaken(candidate)) {
      return candidate;
    }
  }
}
