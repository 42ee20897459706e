"""Builds what people read from the notebooks, with or without Quarto.

pages.py readme     nbs/index.ipynb → README.md
pages.py site       nbs/ → _docs/: the Quarto site, or plain HTML pages where there is no `quarto` on PATH; of these
                    every link, anchor, image, alternative text and front matter is checked, and an error fails
"""

import argparse
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from execnb.nbio import nb2str, read_nb
from nbconvert import HTMLExporter, MarkdownExporter
from nbdev import processors
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.serve import proc_nbs
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

SECTIONS = {
    "": "",
    "tutorials": "Tutorials",
    "explanations": "Explanations",
    "experiments": "Experiments",
    "api": "API",
}
README_MARK = "<!-- Made from nbs/index.ipynb by `make readme`. Edit the notebook. -->\n\n"


def plain(nb):
    """Carry out the Quarto options nbdev leaves in `nb`, and drop what a static page cannot show."""
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            options = dict(re.findall(r"^#\| *([\w-]+): *(.*?) *$", cell.source, flags=re.M))
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            if options.get("include") == "false":
                continue
            if options.get("echo") == "false" or not cell.source:
                cell.metadata["tags"] = ["hide-source"]
            keep = options.get("output") != "false"
            cell.outputs = [o for o in cell.outputs if keep and o.get("name") != "stderr"]
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = without_attributes(output.data["text/markdown"])
            if cell.metadata.get("tags") and not cell.outputs:
                continue
        elif cell.cell_type == "markdown":
            cell.source = without_attributes(re.sub(r"^:::.*\n?", "", cell.source, flags=re.M))
        else:
            continue
        cells.append(cell)
    nb.cells = cells
    nb.metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}  # nbdev_clean removes this
    return nb


def without_attributes(markdown):
    """Quarto's `[text](url){target=...}` without its braces."""
    return re.sub(r"(\]\([^)\s]*\))\{[^}\n]*\}", r"\1", markdown)


def options(priority):
    """Settings for nbconvert: no prompts, hidden sources hidden, and the first of `priority` an output has."""
    return Config(
        NbConvertBase={"display_data_priority": priority},
        TemplateExporter={"exclude_input_prompt": True, "exclude_output_prompt": True},
        TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-source"}},
    )


def readme():
    cfg = get_config()
    names = ("populate_language", "strip_ansi", "hide_line", "filter_stream_", "rm_header_dash", "rm_export")
    procs = [getattr(processors, name) for name in (*names, "clean_magics", "hide_")]
    nb = read_nb(cfg.nbs_path / cfg.readme_nb)
    NBProcessor(nb=nb, procs=procs, process=True)
    nb = plain(nbformat.reads(nb2str(nb), as_version=4))

    exporter = MarkdownExporter(config=options(["text/markdown", "image/svg+xml", "image/png", "text/plain"]))
    text, found = exporter.from_notebook_node(nb, {"unique_key": "readme", "output_files_dir": "images"})
    figures = {cfg.nbs_path / name: data for name, data in found["outputs"].items()}
    for old in (cfg.nbs_path / "images").glob("readme_*_*.*"):
        if old not in figures:
            old.unlink()
    for path, data in figures.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    text = rebase(text, cfg.nbs_path, cfg.config_path)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()
    (cfg.config_path / "README.md").write_text(README_MARK + text + "\n", encoding="utf-8")


def rebase(text, old, new):
    """The relative links of `text`, which is meant for the folder `old`, made relative to the folder `new`."""

    def moved(match):
        before, url = match.groups()
        if re.match(r"\w+:|[/#{]", url):
            return match.group()
        path, hash_, anchor = url.partition("#")
        return before + Path(os.path.relpath(old / path, new)).as_posix() + hash_ + anchor

    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith("    "):
            prose = re.split(r"(`+[^`]*`+)", line)  # every second part is code
            for i in range(0, len(prose), 2):
                prose[i] = re.sub(r"(\]\()([^)\s]+)", moved, prose[i])
                prose[i] = re.sub(r"""(\b(?:src|href)=["'])([^"']+)""", moved, prose[i])
            line = "".join(prose)
        lines.append(line)
    return "\n".join(lines)


def site(force_plain=False):
    cfg = get_config()
    os.chdir(cfg.config_path)  # nbdev skips every file of a tree below a hidden folder, unless the path is relative
    processed = proc_nbs(path=cfg.nbs_path.name, force=True, n_workers=min(os.cpu_count(), 4))
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    pages = plain_site(processed, cfg.doc_path, f"{cfg.doc_host}{cfg.doc_baseurl}/", cfg.title)
    errors = [*front_errors(pages), *link_errors(cfg.doc_path)]
    if errors:
        raise SystemExit("\n".join(["the site has errors:", *errors]))
    print(f"{len(pages)} pages: links, anchors, images, alternative texts and front matter are in order")
    if shutil.which("quarto") and not force_plain:
        shutil.rmtree(cfg.doc_path)
        subprocess.run(["quarto", "render", "--no-cache"], cwd=processed, check=True)
        shutil.move(processed / cfg.doc_path.name, cfg.doc_path)
    else:
        print("`quarto` is not on PATH, so these are plain HTML pages: no search and no theme, the same text.")
    print(f"{cfg.doc_path.name}/index.html is the first page")


def plain_site(source, target, url, title):
    """One HTML page for each notebook below `source`, each with the list of all; other files are copied."""
    pages = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.suffix == ".ipynb":
            nb = nbformat.read(path, as_version=4)
            front = yaml.safe_load(nb.cells[0].source.strip("-\n ")) if nb.cells[0].cell_type == "raw" else {}
            pages.append((name.with_name(page_name(name.name)), front, plain(nb)))
        elif path.is_file() and path.suffix not in (".yml", ".qmd"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)

    mime = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]
    exporter = HTMLExporter(template_name="basic", anchor_link_text="", config=options(mime))
    for name, front, nb in pages:
        up = "../" * (len(name.parts) - 1)
        body, _ = exporter.from_notebook_node(nb)
        body = body.replace(f'href="{url}', f'href="{up}')
        body = re.sub(r'href="(?!\w+:)([^"#]*\.ipynb)', lambda m: f'href="{page_link(m[1])}', body)
        body = re.sub(r'(<h\d id="|href="#)([^"]+)', lambda m: m[1] + m[2].lower(), body)  # nbdev links to these
        head = f"<h1>{escape(str(front.get('title', name.stem)))}</h1>"
        if "description" in front:
            head += f"<p class=lead>{escape(str(front['description']))}</p>"
        page = PAGE.format(title=escape(title), css=CSS, up=up, nav=navigation(pages, up, name), body=head + body)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(page, encoding="utf-8")
    return pages


def front_errors(pages):
    "Pages without a title or a description, and titles that two pages share."
    seen = {}
    for name, front, _ in pages:
        for key in ("title", "description"):
            if not str(front.get(key) or "").strip():
                yield f"{name}: its front matter has no {key}"
        title = front.get("title")
        if title in seen:
            yield f"{name}: its title {title!r} is that of {seen[title]} too"
        seen.setdefault(title, name)


class Links(HTMLParser):
    "What a page links to, the names it can be linked at, and its images."

    def __init__(self, text):
        super().__init__()
        self.links, self.names, self.unnamed = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {unquote(given[key]) for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]
        if tag == "img" and not (given.get("alt") or "").strip():
            self.unnamed.append(given.get("src", "")[:60])

    def has(self, name):
        "Can it be linked at `name`? What nbdev links to a method is on the page of its class."
        return name in self.names or name.rpartition(".")[0] in self.names


def link_errors(folder):
    "Links of the pages in `folder` that lead nowhere, and images without an alternative text."
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        here = path.relative_to(folder)
        yield from (f"{here}: image {src!r} has no alternative text" for src in page.unnamed)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir():
                there /= "index.html"
            if not there.exists() or folder.resolve() not in there.resolve().parents:
                yield f"{here}: {link!r} leads nowhere"
            elif parts.fragment and there in pages and not pages[there].has(unquote(parts.fragment)):
                yield f"{here}: {link!r}: the page has no such place"


def page_name(notebook):
    """`00_lattice.ipynb` → `lattice.html`, as nbdev and its links have it."""
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.lower()).removesuffix(".ipynb") + ".html"


def page_link(link):
    folder, slash, notebook = link.rpartition("/")
    return folder + slash + page_name(notebook)


def navigation(pages, up, here):
    parts = []
    for folder, heading in SECTIONS.items():
        items = [
            f'<li><a href="{up}{name.as_posix()}"{" class=here" if name == here else ""}>'
            f"{escape(str(front.get('title', name.stem)))}</a></li>"
            for name, front, _ in pages
            if name.parent.as_posix().strip(".") == folder
        ]
        if items:
            parts.append((f"<h2>{heading}</h2>" if heading else "") + f"<ul>{''.join(items)}</ul>")
    return "".join(parts)


CSS = (
    (
        """
:root { color-scheme: light dark; }
body { margin: 0; display: grid; grid-template-columns: 15rem minmax(0, 52rem); gap: 2rem; line-height: 1.55;
       font-family: system-ui, sans-serif; }
nav { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1rem; box-sizing: border-box;
      font-size: .9rem; }
nav h2 { font-size: .8rem; text-transform: uppercase; opacity: .7; margin: 1rem 0 .2rem; }
nav ul { list-style: none; margin: 0; padding: 0; } nav a { text-decoration: none; } .here { font-weight: bold; }
main { padding: 1rem 1rem 4rem; } .lead { font-size: 1.15rem; opacity: .8; }
pre { overflow-x: auto; padding: .6rem; margin: .4rem 0; background: #8881; border-radius: 4px; font-size: .85rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8884; } img { max-width: 100%; }
blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid #8886; }
@media (max-width: 50rem) { body { display: block; } nav { position: static; height: auto; } }
"""
        + HtmlFormatter(style="default").get_style_defs(".highlight")
        + "@media (prefers-color-scheme: dark) {"
        + HtmlFormatter(style="github-dark").get_style_defs(".highlight")
        + "} .highlight { background: none !important; }"
    )
    .replace("{", "{{")
    .replace("}", "}}")
    .format()
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{css}</style>
<script>MathJax = {{ tex: {{ inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]] }} }}</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>
</head>
<body>
<nav>{nav}</nav>
<main>{body}</main>
</body>
</html>
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("readme", "site"))
    parser.add_argument("--plain", action="store_true", help="plain pages even where quarto is installed")
    args = parser.parse_args()
    readme() if args.page == "readme" else site(args.plain)
