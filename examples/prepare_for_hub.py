"""
Make a folder that is ready for the Hub of what a run left, and upload it if asked to.

    python examples/prepare_for_hub.py runs/tiny hub/tiny --provenance provenance.yaml
    python examples/prepare_for_hub.py runs/tiny hub/tiny --provenance provenance.yaml --push

The card is rendered from the run's own record; the provenance file has what a run cannot know (docs/publishing.md).
A new repository is private unless --public is given.
"""

import argparse
import sys
from collections.abc import Sequence

from dinosr_hf.hub import prepare, push, read_provenance
from dinosr_hf.utils.command_line import command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare a run's model for the Hub.")
    parser.add_argument("folder", help="where the run left its model")
    parser.add_argument("out", help="the folder to write: a new one")
    parser.add_argument("--provenance", help="YAML file with names, languages and licences")
    parser.add_argument("--repo_id", help="organisation/name on the Hub; goes over the file's, as all of these do")
    parser.add_argument("--license", help="licence of the weights, such as cc-by-4.0")
    parser.add_argument("--languages", nargs="+", help="ISO 639 codes, such as en de")
    parser.add_argument("--base_model", help="what the run started from on the Hub, or unpublished")
    parser.add_argument("--include", nargs="+", default=[], help="further files to put beside the model")
    parser.add_argument("--push", action="store_true", help="upload the folder; needs `hf auth login` once")
    parser.add_argument("--public", action="store_true", help="for everybody, if the repository is a new one")
    options = parser.parse_args(argv)
    if options.public and not options.push:
        parser.error("--public says how to upload, so it needs --push")
    return options


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    given = {name: getattr(options, name) for name in ("repo_id", "license", "languages", "base_model")}
    with command(__file__):
        provenance, record = read_provenance(options.folder, options.provenance, **given)
        ready = prepare(options.folder, options.out, provenance, record, include=options.include)
        print(f"{ready} is ready: {', '.join(sorted(file.name for file in ready.iterdir()))}")
        if options.push:
            print("Uploaded to", push(ready, provenance.repo_id, private=not options.public))
        else:
            print("Read its README.md. Nothing was uploaded: --push does that.")


if __name__ == "__main__":
    main(sys.argv[1:])
