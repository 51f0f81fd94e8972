"""`octavo bench vdb`: the vector database measured against numpy, faiss, usearch, hnswlib and sqlite-vec.

`cli.bench` takes the options and runs the parts: `exact` (every row read), `graph` (HNSW), `overhead` (one call and
files). `engines` calls each library as its makers mean it to be called, `data` makes vectors and knows the true
answers, `timing` alternates what is compared. All of them hand `Measurement`s to `report`, which prints, judges and
draws from them, or from the JSON of an earlier run. Peers come with `pip install octavo[bench]`; one that is not
installed is left out and named.
"""
