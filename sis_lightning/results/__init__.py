"""Records of what was measured, and the tables that are made of them and of the paper's figures."""
