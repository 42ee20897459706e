"""A real JupyterLab or Voila, a real browser, and everything that went wrong in either.

`Jupyter` and `Voila` start a server on a free port, with a token, in a temporary folder; `Page` opens a notebook in
chromium, runs it and works its controls. Errors are collected from four places: the browser's console, the messages of
the kernel (an exception in a callback of a widget is shown nowhere else), the outputs, and the sentence of a lab.
"""

import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "reports" / "browser"
SIZE = {"width": 1280, "height": 800}

# Noise of others, each with its reason. What matches is not counted; everything else in the console is an error.
UPSTREAM = {
    r"Failed to load resource.*cdn\.jsdelivr\.net/npm/@fortawesome": "Voila's template gets its icons from a CDN; the "
    "tests close the network, and without it there is a word where an icon would be",
    r"^page: \[anywidget\] Failed to initialize model\.$": "anywidget says so two seconds after a widget's start, "
    "where plotly's five megabytes are still being read; the figure comes, and the tests look at it",
}


def chromium():
    "The path of the browser, or None: what CHROMIUM names, else Debian's or another one on PATH."
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_notebook(path, *cells):
    "A notebook of code cells; returns its path."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nb, path)
    return Path(path)


class Server:
    "A server in `folder`, of which nothing is left behind: its whole family of processes is ended, also after a fault."

    def __init__(self, folder, theme="light"):
        self.folder, self.theme = Path(folder), theme
        self.token, self.port, self.process = secrets.token_hex(16), free_port(), None
        self.home = self.folder / f".server-{self.port}"  # its settings, apart from those of the user

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def environment(self):
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        for name in ("config", "data", "runtime"):
            env[f"JUPYTER_{name.upper()}_DIR"] = str(self.home / name)
        env.update(
            IPYTHONDIR=str(self.home / "ipython"),
            JUPYTERLAB_SETTINGS_DIR=str(self.home / "settings"),
            JUPYTERLAB_WORKSPACES_DIR=str(self.home / "workspaces"),
            HF_HUB_OFFLINE="1",
            PYTHONUNBUFFERED="1",
        )
        env.pop("JUPYTER_TOKEN", None)
        return env

    def __enter__(self):
        self.home.mkdir(parents=True)
        self.log = self.home / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"{type(self).__name__} did not start:\n{self.log.read_text()[-3000:]}")

    def ask(self, path, method="GET"):
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def family(self):
        try:
            server = psutil.Process(self.process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def __exit__(self, *_):
        family = self.family()  # kernels live in sessions of their own: the group of the server does not hold them
        for end in ("terminate", "kill"):
            for process in family:
                try:
                    getattr(process, end)()
                except psutil.NoSuchProcess:
                    pass
            if not psutil.wait_procs(family, timeout=5)[1]:
                break
        self.process.wait(5)


class Jupyter(Server):
    "JupyterLab, without news, updates and a browser of its own."

    def command(self):
        settings = {
            "apputils-extension/notification": {
                "fetchNews": "false",
                "checkForUpdates": False,
                "doNotDisturbMode": True,
            },
            "apputils-extension/themes": {"theme": f"JupyterLab {self.theme.title()}"},
        }
        for name, values in settings.items():
            path = self.home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.folder,
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": True,
            "IdentityProvider.token": self.token,
            "LabApp.news_url": "None",
            "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
            "LabApp.extension_manager": "readonly",
        }
        return [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]


class Voila(Server):
    "Voila on one notebook or a folder of them, with the options of `make app`."

    def __init__(self, folder, notebook="", theme="light", options=()):
        super().__init__(folder, theme)
        self.notebook, self.options = notebook, options

    def command(self):
        options = ("--Voila.ip=127.0.0.1", f"--port={self.port}", "--no-browser", f"--token={self.token}")
        options += (f"--theme={self.theme}", *self.options)
        return [sys.executable, "-m", "voila", *([self.notebook] if self.notebook else []), *options]


def kernel_message(frame):
    "The type and the content of a message that the kernel sent to the browser, from a frame of its web socket."
    if isinstance(frame, str):
        message = json.loads(frame)
        return message["header"]["msg_type"], message["content"]
    count = struct.unpack_from("<Q", frame)[0]  # protocol v1: offsets of channel, header, parent, metadata, content
    at = struct.unpack_from(f"<{count}Q", frame, 8)
    header, content = (json.loads(frame[at[i] : at[i + 1]]) for i in (1, 4))
    return header["msg_type"], content


class Page:
    "A notebook in the browser. `faults` is the list of all that went wrong."

    def __init__(self, browser, theme="light"):
        self.context = browser.new_context(viewport=SIZE, color_scheme=theme, reduced_motion="reduce")
        self.context.set_default_timeout(60_000)
        self.page, self.faults, self.theme = self.context.new_page(), [], theme
        self.kernel = ""  # the last state that the kernel told
        self.stderr = ""  # all that it wrote there; one traceback may come in several pieces
        self.context.route(re.compile(r"^https?://(?!127\.0\.0\.1:)"), lambda route: route.abort())  # no network
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda e: self._fault("page", str(e)))
        self.page.on("crash", lambda _: self._fault("page", "the page has crashed"))
        self.page.on("websocket", lambda s: "/channels" in s.url and s.on("framereceived", self._frame))

    def _fault(self, kind, text):
        if not any(re.search(pattern, f"{kind}: {text}") for pattern in UPSTREAM):
            self.faults.append(f"{kind}: {text}")

    def _console(self, message):
        if message.type == "error":
            self._fault("console", f"{message.text} ({message.location.get('url', '')})")

    def _frame(self, frame):
        kind, content = kernel_message(frame)
        if kind == "status":
            self.kernel = content["execution_state"]
        elif kind == "error":
            trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"]))
            self._fault("kernel", f"{content['ename']}: {content['evalue']}\n{trace}")
        elif kind == "stream" and content["name"] == "stderr":
            self.stderr += content["text"]

    def look(self):
        "The faults so far, with the error outputs and the sentences of labs that are on the page now."
        self.page.wait_for_timeout(50)  # lets events come in
        red = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
        shown = [
            text
            for text in self.page.locator(red).all_inner_texts()
            if re.search("Traceback|error when executing", text)
        ]
        shown += [text for text in self.page.locator(".lo-wrong").all_inner_texts() if text.strip()]
        threads = [f"stderr: {self.stderr}"] if "Traceback (most recent call last)" in self.stderr else []
        return [*self.faults, *threads, *(f"shown: {text.strip()}" for text in shown)]

    def slider(self, label):
        "The handle of the slider that is called `label`."
        return self.control(label).get_by_role("slider")

    def control(self, label):
        "The widget that is called `label`."
        name = self.page.locator(".widget-label", has_text=re.compile(f"^\\s*{re.escape(label)}\\s*$"))
        return (
            self.page.locator(".jupyter-widgets.widget-inline-hbox, .jupyter-widgets.widget-inline-vbox")
            .filter(has=name)
            .first
        )

    def press(self, label, key, times=1):
        "Press a key on a slider; returns the value that it then shows."
        handle = self.slider(label)
        handle.focus()
        for _ in range(times):
            handle.press(key)
        return float(handle.get_attribute("aria-valuenow"))

    def shoot(self, name, where=None):
        "A picture in reports/browser."
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}-{self.theme}.png"
        (where or self.page).screenshot(path=path)
        return path

    def until(self, holds, otherwise, seconds=60):
        "Wait until `holds()`. The time is for a machine that does much else besides; it is no measure of anything."
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(f"{otherwise} after {seconds:g} s")
            self.page.wait_for_timeout(50)

    def wait_change(self, selector, act, seconds=60.0, what="textContent", quiet=0.3):
        """Do `act`, wait until `what` (textContent or innerHTML) of `selector` is another one and rests; returns the
        milliseconds from the key or click to the first repaint that shows a change, and to the last one."""
        self.page.evaluate(WATCH, [selector, what, quiet * 1000, seconds * 1000])
        act()
        times = self.page.evaluate("window.libortho_watch")
        assert times, f"{selector} did not change in {seconds:g} s"
        return times

    def close(self):
        self.context.close()


# Runs in the page. The clock starts with the first key, click or input; it is read in the frame after the one that
# paints a change. `quiet` is how long nothing may change for the change to be the last.
WATCH = """([selector, what, quiet, limit]) => {
  const target = document.querySelector(selector);
  if (!target) throw new Error("nothing matches " + selector);
  const before = target[what], kinds = ["keydown", "pointerdown", "input"];
  let start = null, first = null, last = null, timer = null;
  const begin = e => { if (start === null) start = performance.now(); };
  for (const kind of kinds) document.addEventListener(kind, begin, true);
  window.libortho_watch = new Promise(resolve => {
    const end = () => {
      watch.disconnect(); clearTimeout(alarm);
      for (const kind of kinds) document.removeEventListener(kind, begin, true);
      resolve(first === null ? null : {first, last});
    };
    const watch = new MutationObserver(() => {
      if (start === null || (first === null && target[what] === before)) return;
      requestAnimationFrame(() => setTimeout(() => {
        last = performance.now() - start;
        if (first === null) first = last;
        clearTimeout(timer); timer = setTimeout(end, quiet);
      }));
    });
    watch.observe(target, {subtree: true, childList: true, characterData: true, attributes: what === "innerHTML"});
    const alarm = setTimeout(end, limit);
  });
}"""


class Notebook(Page):
    "A notebook in JupyterLab."

    def __init__(self, browser, server, name):
        super().__init__(browser, server.theme)
        self.server, self.name = server, name
        self.page.goto(f"{server.url}/doc/tree/{name}?token={server.token}")
        self.page.locator(".jp-NotebookPanel-toolbar").wait_for()
        self.until(lambda: self.kernel == "idle", "its kernel is not ready")

    def run_all(self, seconds=120):
        "Run ▸ Run All Cells, as a user does, and wait until every cell has run or one has failed."
        self.start_all()
        self.until(self.has_run, "it still runs", seconds)

    def start_all(self):
        "Run ▸ Run All Cells."
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()

    def has_run(self):
        prompts = [p.strip() for p in self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]
        failed = any(fault.startswith("kernel") for fault in self.faults)
        return self.kernel == "idle" and "[*]:" not in prompts and (failed or "[ ]:" not in prompts)

    def change_theme(self, theme):
        "Settings ▸ Theme."
        self.page.get_by_role("menuitem", name="Settings", exact=True).click()
        self.page.locator(".lm-Menu-item", has_text=re.compile("^Theme")).hover()
        self.page.locator(".lm-Menu-item", has_text=re.compile(f"^JupyterLab {theme.title()}$")).click()
        self.page.locator(f"body[data-jp-theme-name='JupyterLab {theme.title()}']").wait_for(state="attached")
        self.theme = theme

    def close(self):
        super().close()
        for session in self.server.ask("api/sessions"):
            if session["path"] == self.name:
                self.server.ask(f"api/sessions/{session['id']}", "DELETE")


class App(Page):
    "A notebook under Voila."

    def __init__(self, browser, server, name="", seconds=120):
        super().__init__(browser, server.theme)
        path = f"voila/render/{name}" if name else ""
        self.page.goto(f"{server.url}/{path}?token={server.token}&theme={server.theme}", timeout=seconds * 1000)


@contextmanager
def opened(kind, browser, *args, **kwargs):
    "A page that is closed at the end; where the test fails, a picture of its last sight is kept."
    page = kind(browser, *args, **kwargs)
    try:
        yield page
    except BaseException:
        page.shoot(f"failed-{Path(getattr(page, 'name', 'app')).stem}")
        raise
    finally:
        page.close()
