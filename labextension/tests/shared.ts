import { TranslationBundle } from '@jupyterlab/translation';
import { readFileSync } from 'fs';
import { join } from 'path';

/** Texts as they are written, with what is put into them. */
export const trans = {
  __: (text: string, ...given: string[]) => text.replace(/%(\d)/g, (_, at) => given[Number(at) - 1])
} as unknown as TranslationBundle;

/** A message that the tests of the kernel's side hold real kernels to. */
export const load = (name: string) =>
  JSON.parse(readFileSync(join(__dirname, '..', '..', 'tests', 'jupyter', 'messages', name), 'utf8'));

export const settled = () => new Promise(resolve => setTimeout(resolve));
