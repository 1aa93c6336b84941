type Child = Node | string | null | undefined | false;

/** An element with attributes, handlers (names that begin with "on") and children; what is null or false is left out. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  given: Record<string, unknown> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith('on')) {
      element.addEventListener(name.slice(2), value as EventListener);
    } else if (name.startsWith('aria-')) {
      element.setAttribute(name, String(value)); // where "false" says something
    } else if (value === true) {
      element.setAttribute(name, '');
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(
    ...children.filter((child): child is Node | string => child instanceof Node || typeof child === 'string')
  );
  return element;
}

/** Put new children into an element; the one that had the focus keeps it, by its `data-key`. */
export function replace(element: HTMLElement, ...children: Child[]): void {
  const focused = element.contains(document.activeElement)
    ? (document.activeElement as HTMLElement).dataset.key
    : undefined;
  element.replaceChildren(
    ...children.filter((child): child is Node | string => child instanceof Node || typeof child === 'string')
  );
  if (focused !== undefined) {
    const again = [...element.querySelectorAll<HTMLElement>('[data-key]')].find(one => one.dataset.key === focused);
    again?.focus();
  }
}
