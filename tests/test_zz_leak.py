import subprocess
def test_leak():
    subprocess.Popen(["sleep", "300"], start_new_session=True)
