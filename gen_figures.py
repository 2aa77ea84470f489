"""Draw the figures: run the notebooks, which write .png and .pdf to results/figures/.

    python gen_figures.py --datasets Digits

Figure 1 needs nothing and takes a minute on a CPU; the others take seconds and are made from the newest files that
gen_attack_stats.py and gen_eval.py left in results/backup/, or from the models CCU and Base (README, "Figures").
What can't be made yet is named with the command that is missing.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model_paths
from utils import cli, files
from utils.errors import UserError

NOTEBOOKS = Path(__file__).parent / "notebooks"


def main(args):
    first = model_paths.figure("Figure1_TwoMoons")
    files.check_writable(f"{first}.png", f"{first}.pdf")
    draw("Figure1_TwoMoons")
    drawn = [d for d in args.datasets if draw("Figure2_Samples", dataset=d)]
    if drawn:       # the others are named already
        draw("Figure3_Histograms", dataset=" ".join(drawn))
    for d in args.datasets:
        draw("Confidences", dataset=d)
        draw("Certificate", dataset=d, data_dir=args.data_dir, image_size=args.image_size)


def draw(name: str, **values) -> bool:
    """Run a notebook and print what it prints; False and a line on stderr where something is missing."""
    try:
        print(run(name, values), end="", flush=True)
    except UserError as error:
        print(f"left out {name}: {error}", file=sys.stderr)
        return False
    return True


def run(name: str, values: dict) -> str:
    """What a notebook prints when it runs here with the `values` of its first cell replaced."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    lines = "\n".join(f"{variable} = {value!r}" for variable, value in values.items())
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(lines))
    path = os.pathsep.join(filter(None, (str(NOTEBOOKS.parent.resolve()), os.environ.get("PYTHONPATH"))))
    started, ended = threading.Event(), threading.Event()
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": Path.cwd()}},
                            extra_arguments=["--log-level=ERROR"], on_notebook_start=lambda notebook: started.set())

    def execute():
        try:
            client.execute(env=os.environ | {"PYTHONPATH": path})
        finally:
            for line in dict.fromkeys(printed(notebook, "stderr").splitlines(keepends=True)):       # warnings
                print(line, end="", file=sys.stderr)
            ended.set()
    with ThreadPoolExecutor(1) as pool:     # in the main thread nbclient would take Ctrl-C over, and only print errors
        try:
            pool.submit(execute).result()   # Ctrl-C may come before submit returns, too
        except CellExecutionError as error:
            if error.ename in (UserError.__name__, *(kind.__name__ for kind in UserError.__subclasses__())):
                raise UserError(error.evalue) from error
            raise
        except KeyboardInterrupt:
            while not ended.is_set() and not started.wait(0.1):     # a kernel that only starts cannot be ended cleanly
                pass
            if not ended.is_set():
                client.km.provisioner.process.kill()
            raise
    return printed(notebook, "stdout")


def printed(notebook, stream: str) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ())
                   if output.output_type == "stream" and output.name == stream)


def parser() -> cli.Parser:
    return cli.Parser(__doc__).datasets().data_dir()


if __name__ == "__main__":
    cli.run(main, parser())
