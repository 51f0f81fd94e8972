"""`octavo models`: which models can be attached, and what `attach` would do with one."""

from typing import Annotated

import typer
from rich.table import Table

from octavo.cli.terminal import console

app = typer.Typer()


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder, config.json or default; nothing lists what is tested.")
    ] = None,
    refused: Annotated[bool, typer.Option("--refused", help="List what is refused, with the reasons.")] = False,
) -> None:
    """List the decoder classes that can be attached, or say what `attach` would do with a model."""
    if model is not None:
        _one(model)
        return
    from octavo.models.listing import walked

    classes = walked()
    shown = [each for each in classes if (each.outcome != "exact") == refused]
    table = Table("class", "model type", *(["why"] if refused else []))
    for each in shown:
        table.add_row(each.name, each.type, *([each.why] if refused else []))
    console.print(table)
    exact = sum(each.outcome == "exact" for each in classes)
    console.print(
        f"{exact} of {len(classes)} types of AutoModelForCausalLM answer attached as unattached (docs/models.md); "
        "others are tried when they are attached. octavo models ID says what attach would do."
    )


def _one(source: str) -> None:
    """What would become of one model; exit code 1 where it would be refused."""
    from octavo.models.listing import foresee

    with console.status("making the model without its weights"):
        found = foresee(source)
    if found.refused is None:
        console.print(f"{found.name}: octavo.attach takes it")
        for name, value in found.facts:
            console.print(f"  {name}: {value}")
        return
    if found.walked is not None:
        said = "takes tiny models of this class" if found.walked.outcome == "exact" else f"says: {found.walked.why}"
        console.print(f"{found.name}: its layers cannot be tried without weights; octavo.attach {said}")
        raise typer.Exit(0 if found.walked.outcome == "exact" else 1)
    console.print(f"octavo.attach refuses it: {found.refused}")
    raise typer.Exit(1)
