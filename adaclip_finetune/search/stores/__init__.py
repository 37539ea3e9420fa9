"""Where the vectors of an index can be searched: its own folder, or a Milvus collection."""
