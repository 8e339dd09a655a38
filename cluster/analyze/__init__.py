"""The Mixtral paper's section 5 (arXiv 2401.04088) for any model and any texts: which tokens go to which expert."""
