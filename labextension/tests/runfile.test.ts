import { RunFile } from '../src/runfile';
import { settled, trans } from './shared';

describe('the tab of a saved run', () => {
  let place: string | null;
  let answer: () => Promise<void>;
  const done: unknown[] = [];
  const opener = {
    place: () => place,
    open: (path: string) => (done.push(path), answer()),
    panel: () => done.push('panel')
  };
  const made = () => new RunFile('deep/kept.zarr.zip', trans, opener, () => done.push('gone'));
  const button = (file: RunFile) => file.node.querySelector('button');
  beforeEach(() => {
    done.splice(0);
    place = 'first.ipynb';
    answer = () => Promise.resolve();
  });

  it('opens it in the kernel in view, and goes', async () => {
    const file = made();
    const opening = file.open();
    void file.open(); // a second one does nothing
    expect(file.node.textContent).toBe('kept.zarr.zipOpening it in the kernel of first.ipynb');
    await opening;
    expect(done).toEqual(['deep/kept.zarr.zip', 'gone']);
  });

  it('says what to do where no kernel has bnviz, and opens it when one has', async () => {
    place = null;
    const file = made();
    await file.open();
    expect(file.node.textContent).toContain('no notebook in view has bnviz loaded');
    expect(file.node.querySelector('pre')!.textContent).toBe('import bnviz\nrun = bnviz.open("kept.zarr.zip")');
    button(file)!.click();
    expect(done).toEqual(['panel']);
    place = 'second.ipynb';
    file.update();
    expect(button(file)!.textContent).toBe('Open in the kernel of second.ipynb');
    button(file)!.click();
    await settled();
    expect(done).toEqual(['panel', 'deep/kept.zarr.zip', 'gone']);
  });

  it('says why it did not open, and tries again only when that is asked for', async () => {
    answer = () => Promise.reject(new Error('No run is there.'));
    const file = made();
    await file.open();
    expect(file.node.querySelector('[role=alert]')!.textContent).toBe('No run is there.');
    await file.open(); // the tab is looked at
    expect(done).toHaveLength(1);
    answer = () => Promise.resolve();
    button(file)!.click();
    await settled();
    expect(done).toHaveLength(3);
  });

  it('keeps the focus of its button while what it says is the same', () => {
    const file = made();
    const before = button(file);
    file.update();
    expect(button(file)).toBe(before);
  });
});
