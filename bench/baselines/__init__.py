"""What the library is compared with: the published algorithm and the usual ways of writing each op."""
