"""Extra fields and parameters that an objective needs beside the decoded image, one file each."""
