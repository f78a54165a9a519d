"""
Cluster the features of a layer with k-means, to use the clusters as units.

    python examples/fit_kmeans.py runs/base my_speech --output kmeans.safetensors --layer 6 --num_clusters 100
    python examples/extract_units.py runs/base my_speech --output_dir units --kmeans kmeans.safetensors

The same as `dinosr kmeans`; `--help` says more.
"""

import sys

from dinosr_hf.commands.fit_kmeans import main

if __name__ == "__main__":
    main(sys.argv[1:])
